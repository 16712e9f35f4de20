"""softprompt adapts a frozen language model to a task by learning a few virtual tokens (prompt tuning)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.comparison.run import Comparison as Comparison
    from softprompt.comparison.run import ComparisonCallback as ComparisonCallback
    from softprompt.comparison.run import compare as compare
    from softprompt.config import GenerateConfig as GenerateConfig
    from softprompt.config import TuneConfig as TuneConfig
    from softprompt.data.rows import Rows as Rows
    from softprompt.data.rows import load_data as load_data
    from softprompt.errors import DataError as DataError
    from softprompt.errors import InputError as InputError
    from softprompt.errors import ModelError as ModelError
    from softprompt.errors import PromptError as PromptError
    from softprompt.errors import RunError as RunError
    from softprompt.errors import SettingsError as SettingsError
    from softprompt.errors import SoftpromptError as SoftpromptError
    from softprompt.errors import StorageError as StorageError
    from softprompt.evaluation.evaluate import Evaluation as Evaluation
    from softprompt.evaluation.evaluate import evaluate as evaluate
    from softprompt.evaluation.intervals import Metric as Metric
    from softprompt.evaluation.predict import Prediction as Prediction
    from softprompt.evaluation.predict import predict as predict
    from softprompt.generation import generate as generate
    from softprompt.model.backends.verify import freeze as freeze
    from softprompt.model.frozen import FrozenModel as FrozenModel
    from softprompt.model.load import load_model as load_model
    from softprompt.prompt.ensemble import Ensemble as Ensemble
    from softprompt.prompt.loading import load_prompt as load_prompt
    from softprompt.prompt.soft_prompt import SoftPrompt as SoftPrompt
    from softprompt.training.callbacks import Callback as Callback
    from softprompt.training.ensemble import EnsembleResult as EnsembleResult
    from softprompt.training.ensemble import tune_ensemble as tune_ensemble
    from softprompt.training.hf_module import TrainablePrompt as TrainablePrompt
    from softprompt.training.tune import TuneResult as TuneResult
    from softprompt.training.tune import tune as tune

__version__ = "0.1.0"

# The module of each public name: imported on first use, so that `softprompt --help` does not wait for torch.
_MODULES = {
    "softprompt.comparison.run": ("Comparison", "ComparisonCallback", "compare"),
    "softprompt.config": ("GenerateConfig", "TuneConfig"),
    "softprompt.data.rows": ("Rows", "load_data"),
    "softprompt.errors": (
        "DataError",
        "InputError",
        "ModelError",
        "PromptError",
        "RunError",
        "SettingsError",
        "SoftpromptError",
        "StorageError",
    ),
    "softprompt.evaluation.evaluate": ("Evaluation", "evaluate"),
    "softprompt.evaluation.intervals": ("Metric",),
    "softprompt.evaluation.predict": ("Prediction", "predict"),
    "softprompt.generation": ("generate",),
    "softprompt.model.backends.verify": ("freeze",),
    "softprompt.model.frozen": ("FrozenModel",),
    "softprompt.model.load": ("load_model",),
    "softprompt.prompt.ensemble": ("Ensemble",),
    "softprompt.prompt.loading": ("load_prompt",),
    "softprompt.prompt.soft_prompt": ("SoftPrompt",),
    "softprompt.training.callbacks": ("Callback",),
    "softprompt.training.ensemble": ("EnsembleResult", "tune_ensemble"),
    "softprompt.training.hf_module": ("TrainablePrompt",),
    "softprompt.training.tune": ("TuneResult", "tune"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
