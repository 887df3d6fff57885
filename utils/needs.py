"""Which names a cell binds, and which it takes from elsewhere; which cells of a section a claim needs."""

import ast
import builtins
import symtable
from collections.abc import Iterator

SHOWING = {"print", "tell", "display", "plots", "board"}  # calls on these change no name of a section
CHANGING = {"pop", "setdefault", "recover"}  # methods that change their object and are called for their value, too


def undefined_in(source: str, defined: set[str]) -> set[str]:
    """Names that a cell uses and that are not `defined`: by a statement before they are bound, or by a function nowhere bound."""
    bound_here, _, outside = names_of(source)
    missing, bound = outside - bound_here - defined, set(defined)
    for statement in ast.parse(source).body:
        new, used, _ = names_of(ast.unparse(statement))
        at_once = new
        if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):  # the right side is read before the left is bound
            at_once = {node.target.id for node in ast.walk(statement) if isinstance(node, ast.NamedExpr)}
        if isinstance(statement, ast.AugAssign):
            used = used | new
        missing |= used - bound - at_once
        bound |= new
    return missing


def names_of(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a source binds at its top level, that it uses there, and that its functions and classes take from outside."""
    table = symtable.symtable(source, "cell", "exec")
    symbols = table.get_symbols()
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()}
    bound |= set(walrus_targets(ast.parse(source)))
    used = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}

    def outside(scope: symtable.SymbolTable) -> set[str]:
        own = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_referenced() and symbol.is_global()}
        return own.union(*(outside(child) for child in scope.get_children()))

    return bound, used, set().union(*(outside(child) for child in table.get_children()))


def walrus_targets(node: ast.AST) -> Iterator[str]:
    """Names that `:=` binds outside of functions: inside a comprehension, too, it binds in what surrounds that."""
    if isinstance(node, ast.NamedExpr):
        yield node.target.id
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield from walrus_targets(child)


# --- what a claim needs ---------------------------------------------------------------------------------------------


def judges_over_seeds(source: str) -> bool:
    """Whether a cell judges a claim whose unit is the seed: a call `board.claim` with "seed" among its arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "board.claim":
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(argument, ast.Constant) and argument.value == "seed" for argument in given):
                return True
    return False


def needed(code: dict[int, str], ends: list[int]) -> set[int]:
    """The places of the cells that `ends` need, these among them. `code` is place -> source, of one section, in order.

    For each name that a cell takes from outside: the last cell before it that binds the name (for a name that functions take, else the
    first after it), and the cells in between that change what is bound. What is in no cell of the section is the opening's.
    """
    bound = {place: names_of(source)[0] for place, source in code.items()}
    called = {name: names for source in code.values() for name, names in changed_by_calls(source).items()}
    altered = {
        place: changed(source).union(*(called.get(name, ()) for name in names_of(source)[1])) for place, source in code.items()
    }
    chosen, waiting = set(), list(ends)
    while waiting:
        place = waiting.pop()
        if place in chosen:
            continue
        chosen.add(place)
        for name in undefined_in(code[place], set(dir(builtins))):
            before = [other for other in code if other < place and name in bound[other]]
            after = [other for other in code if other > place and name in bound[other]]
            origin = before[-1] if before else after[0] if after else None
            if origin is not None:
                waiting += [origin, *(other for other in code if origin < other < place and name in altered[other])]
    return chosen


def changed_by_calls(source: str) -> dict[str, set[str]]:
    """Function -> the names from outside that its body changes: whoever calls it changes them."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    outside = {node.name: names_of(ast.unparse(node))[2] for node in functions}
    return {node.name: changed(ast.unparse(node)) & outside[node.name] for node in functions}


def changed(source: str) -> set[str]:
    """Names whose objects a cell may change: it assigns to a part of them, calls a method for its effect, or hands them to such a call.

    Names in capitals are constants here (labels, numbers): a call that is handed one does not change it.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            found.add(owner(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            found.add(owner(node.func))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and owner(node.value.func) not in SHOWING:
            given = {owner(part) for part in node.value.args if not isinstance(part, ast.Call)}
            found |= {owner(node.value.func)} | {name for name in given if name and not name.isupper()}
    return found - {None} - SHOWING


def owner(node: ast.expr) -> str | None:
    """The name at the root of `a.b[0].c()`; None where there is none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
