"""Fine-tune a language model: decide whether to, plan it, train it, and measure that it worked.

    import tunesmith

    plan = tunesmith.plan("recipe.yaml", learning_rate=1e-4)
    for event in tunesmith.train(plan):
        print(event)
    record = tunesmith.read_record(plan.config.output_dir)

Most verbs of the command line are functions of the same name here and return the objects that
--json prints; eval is `evaluate`, runs is `list_runs`, report is `write_report`, and serve and keys
are commands only. docs/reference/python.md shows them. The import loads no model library."""

from importlib import import_module
from typing import TYPE_CHECKING

import tunesmith.core.program_start  # noqa: F401  (first: search path and signals)
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError, TunesmithError
from tunesmith.core.events import (
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    StageStart,
    TrainingEnd,
    TrainStep,
)
from tunesmith.core.sampling import SamplingParams
from tunesmith.core.types import (
    Comparison,
    DataReport,
    Finding,
    Machine,
    ModelSpec,
    Plan,
    PlanValue,
    RunRecord,
    __version__,
)
from tunesmith.plan.stages import StagedPlan

if TYPE_CHECKING:
    from tunesmith.recipe.fields import DataSource
    from tunesmith.recipe.schema import Recipe, Stages
else:

    def __getattr__(name: str) -> object:
        """Import the classes of a recipe at their first use: building them takes half as long as
        all other imports of `tunesmith --help`."""
        modules = {"DataSource": "fields", "Recipe": "schema", "Stages": "schema"}
        if name in modules:
            return getattr(import_module(f"tunesmith.recipe.{modules[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Importing a submodule binds its name in this package. Those that share the name of a verb are
# imported first, so that the verb wins.
for _namesake in ("advise", "evaluate", "export", "plan", "train"):
    import_module(f"tunesmith.{_namesake}")

from tunesmith.api import (  # noqa: E402
    advise,
    advise_measured,
    chat,
    compare,
    compare_methods,
    data_check,
    data_curate,
    data_export_reviews,
    data_import_reviews,
    data_lock,
    data_show,
    data_split,
    demo,
    doctor,
    evaluate,
    export,
    export_servers,
    init,
    list_runs,
    plan,
    read_plan,
    read_record,
    read_verdict,
    resume,
    schema,
    train,
    tune_lr,
    tune_sweep,
    verify,
    write_report,
)

__all__ = [
    "CheckResult",
    "CheckpointSaved",
    "Comparison",
    "DataReport",
    "DataSource",
    "Event",
    "Finding",
    "GateError",
    "GenerationSample",
    "InputError",
    "Interrupted",
    "Machine",
    "MachineError",
    "ModelSpec",
    "Plan",
    "PlanValue",
    "Recipe",
    "RunRecord",
    "SamplingParams",
    "Score",
    "StageStart",
    "StagedPlan",
    "Stages",
    "TrainStep",
    "TrainingEnd",
    "TunesmithError",
    "__version__",
    "advise",
    "advise_measured",
    "chat",
    "compare",
    "compare_methods",
    "data_check",
    "data_curate",
    "data_export_reviews",
    "data_import_reviews",
    "data_lock",
    "data_show",
    "data_split",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "export_servers",
    "init",
    "list_runs",
    "plan",
    "read_plan",
    "read_record",
    "read_verdict",
    "resume",
    "schema",
    "train",
    "tune_lr",
    "tune_sweep",
    "verify",
    "write_report",
]
