"""tunesmith decides whether a language model should be fine-tuned, does it right, and proves that
it worked.

    import tunesmith

    plan = tunesmith.plan("recipe.yaml", learning_rate=1e-4)
    for event in tunesmith.train(plan):
        print(event)
    record = tunesmith.read_record(plan["output_dir"])

The verbs of the command line are functions of the same names here, and give the objects that --json
prints; docs/reference/python.md shows each of them. Importing this loads no model library."""

from importlib import import_module

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
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import Recipe, Stages

# Importing a submodule for the first time binds its name here. These have the names of verbs: they
# come first.
for _namesake in ("advise", "evaluate", "export", "plan", "train"):
    import_module(f"tunesmith.{_namesake}")

from tunesmith.advising import advise_measured  # noqa: E402
from tunesmith.api import (  # noqa: E402
    advise,
    chat,
    compare,
    compare_methods,
    demo,
    doctor,
    evaluate,
    evaluate_baselines,
    evaluate_full,
    export,
    init,
    measure_relearning,
    plan,
    read_plan,
    read_record,
    resume,
    schema,
    train,
    tune_lr,
    write_report,
)
from tunesmith.dataverbs import (  # noqa: E402
    data_check,
    data_curate,
    data_lock,
    data_prove,
    data_review,
    data_reviewed,
    data_show,
    data_split,
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
    "data_lock",
    "data_prove",
    "data_review",
    "data_reviewed",
    "data_show",
    "data_split",
    "demo",
    "doctor",
    "evaluate",
    "evaluate_baselines",
    "evaluate_full",
    "export",
    "init",
    "measure_relearning",
    "plan",
    "read_plan",
    "read_record",
    "resume",
    "schema",
    "train",
    "tune_lr",
    "write_report",
]
