"""The code behind the notebooks: one module per survey subsection, plus the spine that all chapters share.

The spine, in the order in which a result travels through it: `profiles` (sizes and budgets), `readers` and `tasks` (a user's
files; texts, labels, tokens), `checkpoints` and `bert` (a model folder; the model and its matrices), `training`, `baseline`
(fine-tuned once, cached), `costs` and `metrics` (the ruler), `artifacts` and its `header` (what is shipped), `board` (one row per result), `claims`
(verdicts on the surveys' statements), `catalogue`, `notebooks` (weave), `run` and `published` (execute, and check what was
published) and `cli` (the `companion` command).
"""

import logging
import sys
import warnings

# jsonschema, which checks notebooks, compiles the grammar of a format that no notebook has whenever this package is installed: three
# seconds of every start. Without it that one format goes unchecked.
sys.modules.setdefault("rfc3987_syntax", None)
# Progress bars of libraries are of no use in executed notebooks, and neither is the advice to install a widget for them.
warnings.filterwarnings("ignore", message="IProgress not found")
# transformers imports torchao, which tells every user of a CPU that its CUDA kernels do not load.
logging.getLogger("torchao").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # torch.compile's advice to the authors of torchao
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


class CompanionError(ValueError):
    """A mistake that the user can mend; the message says how. The command prints it without a traceback."""


def first_line(error: Exception) -> str:
    """What an error says, short enough for a message of one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
