"""The track `claims`: of every section the claims over seeds and the cells that they need, and no more."""

import pytest

from utils import CompanionError, catalogue, notebooks
from utils.needs import changed, changed_by_calls, judges_over_seeds, needed

CHAPTERS = catalogue.chapters()
WITH_SEEDS = [chapter for chapter in CHAPTERS if notebooks.has_claims_over_seeds(chapter)]


@pytest.mark.parametrize(
    ("cells", "end", "wanted"),
    [
        (["a = 1", "b = 2", "c = a", "c"], 3, {0, 2, 3}),  # only what is used, back to its beginning
        (["a = 1", "a = 2", "a"], 2, {1, 2}),  # the last that binds a name
        (["a = {}", "a['x'] = 1", "b = a", "a.b.c = 1", "a"], 4, {0, 1, 3, 4}),  # and what changes it since
        (["a = []", "a.append(1)", "print(a)", "board.put(a)", "a"], 4, {0, 1, 4}),  # whoever shows it does not
        (["a = []", "fill(a)", "a"], 2, {0, 1, 2}),
        (["A = 'a label'", "put(A)", "A"], 2, {0, 2}),
        (["def f(x):\n    return x", "put(f(1))", "f"], 2, {0, 2}),
        (["a, b = {}, {}", "for i in range(2):\n    (a[i], b[i]), c = (i, i), 1", "b"], 2, {0, 1, 2}),
        (["a = {1: 2}", "b = a.pop(1)", "a"], 2, {0, 1, 2}),  # called for its value
        (["a = {}", "def f(x):\n    a[x] = x\n    return x", "b = f(1)", "c = len(a)", "c"], 4, {0, 1, 2, 3, 4}),  # by a call
        (["def f(x):\n    return x + later", "later = 1", "other = 2", "f(1)"], 3, {0, 1, 3}),  # known when it is called
        (["for a in range(3):\n    pass", "[a for a in range(2)]", "b = a", "b"], 3, {0, 2, 3}),
        (["a = of_the_opening", "a"], 1, {0, 1}),
        (["a = 1", "b = a", "a = 3"], 1, {0, 1}),  # what comes after does not matter
    ],
)  # fmt: skip
def test_cells_that_a_cell_needs(cells, end, wanted):
    assert needed(dict(enumerate(cells)), [end]) == wanted


def test_what_a_cell_changes():
    assert changed("a[0] = 1\nb.c.d += 1\ndel e[0]\nf.g()\nh(i, j.k)\nl = m.n()\no = p.pop()") == set("abefhijp")
    assert changed_by_calls("def f(x):\n    a[x] = 1\n    b = {}\n    b[x] = 2\nclass C: pass") == {"f": {"a"}}


def test_claims_that_are_judged_over_seeds():
    assert judges_over_seeds('board.claim("C1", "It is so", SOURCE, "seed", evidence)')
    assert judges_over_seeds('if x:\n    board.claim("C1", "It is so", SOURCE, unit="seed", evidence=[])')
    assert not judges_over_seeds('board.claim("C1", "a seed", SOURCE, "round", evidence)') and not judges_over_seeds('f("seed")')


@pytest.mark.parametrize("chapter", WITH_SEEDS)
def test_the_track_claims_judges_every_claim_over_seeds_and_stands_alone(chapter):
    whole, part = notebooks.weave(chapter), notebooks.weave(chapter, track="claims")
    judging = [[cell.source for cell in one.cells if cell.cell_type == "code" and judges_over_seeds(cell.source)]
               for one in (whole, part)]  # fmt: skip
    assert judging[0] == judging[1] != [] and notebooks.undefined_names(part) == []
    sections = notebooks.sections(part)
    assert sections[0].key == notebooks.OPENING and notebooks.closing(part, sections[-1])
    for section in sections[1:]:
        code = [cell.source for cell in part.cells[section.first : section.last] if cell.cell_type == "code"]
        assert code[0] == f'board.section("{section.key}")'
    assert len(part.cells) < 0.6 * len(whole.cells)


@pytest.mark.parametrize("chapter", sorted(set(CHAPTERS) - set(WITH_SEEDS)))
def test_a_chapter_without_such_claims_says_so(chapter):
    with pytest.raises(CompanionError, match=f"{chapter} judges no claim over seeds"):
        notebooks.weave(chapter, track="claims")
