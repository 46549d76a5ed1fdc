"""Names say what a thing is: functions are verbs, a class name occurs once, no word is empty. A
file of tests has a name of its own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

PACKAGE = Path(tunesmith.__file__).parent
TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"

# Words without content: they name nothing, alone or as a part of a name.
EMPTY_WORDS = set("found one told known said kept left own asked whole place given".split())  # noqa: SIM905

CHARTS = {"svg_charts.py", "lr_plot.py"}  # where left is a direction

VERBS = set(
    """
    penalize compose construct indent promote
    accept accumulate acquire adapt add adjust admit advance advise align allocate allow analyze
    answer append apply archive ask assert assign assume attach attend average backward balance
    begin
    bind block bootstrap bound break build bundle cache calibrate call can cancel cast cat chain
    change charge chat check choose clamp classify clean clear clip close collapse collate collect
    combine compare compile complete compress compute concat confirm connect consume continue
    convert convolve
    copy correct count cover create curate cut data decide declare decode decompress
    dedent dedupe deduplicate define delete demote dequantize derive describe detach detect
    detokenize diagnose diff disable disallow discard divide download draw drop dump embed emit
    enable encode end enqueue ensure enter enumerate error escape estimate eval evaluate evict
    examine exchange exclude exit expand expect explain export extend extract fail fetch fill filter
    finalize find finish fit fix flag flatten flush fold follow forget fork format forward free
    freeze
    form fsync fuse gather generate get go grade group grow guard guess gunzip halve handle has hash
    hide hold identify ignore import improve include index infer inherit init initialize insert
    inspect install interleave interpolate intersect invert is iter join judge keep label launch
    lay leak learn leave limit link list load locate lock log look lower main make map mark mask
    match materialize measure merge migrate mix move multiply name needs normalize note observe
    offer open order overlap override pack pad pair parse partition pass patch pause permute
    persist pick pin plan plot poll pop predict prefetch prefill prefix prepare preserve print
    probe proceed process project propose prove prune publish pull push put quantize quote raise
    rank
    rate read readmit rebuild receive recommend recompute reconcile record recover redact reduce
    refill refine refuse register reject release reload remap remember remove rename render
    reopen reorder repair repeat replace replay report request require reread resample rescale
    reserve reset reshape resolve restart restore resume retarget retry return reuse reverse
    revert rewrite roll rotate round roundtrip run sample save scale scan schedule score scrub
    seal search seed select send serialize serve set settle share shift shorten should show shrink
    shuffle sign simulate skip slice smooth snap solve sort split squeeze stack standardize
    start step stop store stream stringify strip submit subsample subtract suggest sum summarize
    supports swap sync synthesize take target tell thin throw tick time tokenize track train
    transform translate transpose trim truncate try tune undo unescape union unlink unlock
    unpack untie update upload use uses validate verify view visit wait walk warm warn watch
    weigh widen wrap write yield zero
    """.split()  # noqa: SIM905
)

# What libraries dictate, and what has the name of a verb of the command line.
DICTATED = {
    "getMessage",
    "extra_repr",
    "shell_complete",
    "fromkeys",
    "getitem",
    "getattr",
    "_output_child_to_const",
    "capture_signals",
    "found_inf",  # of torch's optimizers
    "connection_made",  # of asyncio's protocols
    *dir(str),
}
COMMANDS = {"schema", "doctor", "demo"}
CONVERSIONS = re.compile(
    r"_*(from|to|with)_|.*_to_|.*_(forward|backward|loss)$"
)  # from_plan, token_to_id
OPERATIONS = "kernels"  # the folder of operations that have the names of torch: rms_norm


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that the code binds: functions, classes, parameters, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def empty_names(source: str) -> list[tuple[int, str]]:
    names = set(identifiers(ast.parse(source)))
    return sorted(
        (line, name)
        for line, name in names
        if name not in DICTATED and EMPTY_WORDS & set(name.lower().split("_"))
    )


def functions_without_verb(source: str, table_values: set[str]) -> list[tuple[int, str]]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return sorted(
        (node.lineno, node.name)
        for node in functions
        if not is_exempt(node, table_values) and node.name.strip("_").split("_")[0] not in VERBS
    )


def names_in_tables(source: str) -> set[str]:
    """Functions that a plain table at module level names: called by their key, named for it."""
    tables = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
    ]
    return {name.id for table in tables for name in ast.walk(table) if isinstance(name, ast.Name)}


def is_exempt(node: ast.FunctionDef, table_values: set[str]) -> bool:
    """Dunders, properties, context managers, table values, conversions, what libraries dictate."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    nouns = {"property", "cached_property", "functools.cached_property", "contextmanager"}
    is_noun = bool(decorators & nouns) or any(".setter" in text for text in decorators)
    is_dunder = node.name.startswith("__") and node.name.endswith("__")
    exempt = table_values | DICTATED | COMMANDS
    return is_dunder or is_noun or node.name in exempt or bool(CONVERSIONS.match(node.name))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_no_name_is_an_empty_word() -> None:
    files = [path for path in sources() if path.name not in CHARTS]
    breaches = {
        str(path): empty_names(path.read_text()) for path in (*files, *BENCHMARKS.rglob("*.py"))
    }
    assert {path: names for path, names in breaches.items() if names} == {}


def test_functions_are_verbs() -> None:
    tables = set[str]().union(*(names_in_tables(path.read_text()) for path in sources()))
    breaches = {
        str(path): functions_without_verb(path.read_text(), tables)
        for path in sources()
        if path.parent.name != OPERATIONS
    }
    assert {path: names for path, names in breaches.items() if names} == {}


def test_a_class_name_occurs_once() -> None:
    names = Counter(
        node.name
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_a_file_of_tests_has_a_name_of_its_own() -> None:
    """Each is imported by its base name, from whatever folder: a second one would hide it."""
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    del names["conftest.py"]
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("found = 1", "found"),
        ("def load(asked): ...", "asked"),
        ("class A:\n    kept_rows: int", "kept_rows"),
        ("x = [one for one in (1, 2)]", "one"),
        ("self.left = 3", "left"),
        ("try: ...\nexcept OSError as told: ...", "told"),
    ],
)
def test_an_empty_word_is_noticed(source: str, name: str) -> None:
    assert name in [name for _, name in empty_names(source)]


def test_a_function_without_a_verb_is_noticed() -> None:
    source = "def lr_of(): ...\ndef rate(): ...\nRULES = {'rate': rate}\ndef items(): ..."
    assert functions_without_verb(source, names_in_tables(source)) == [
        (1, "lr_of"),
        (4, "items"),
    ]
