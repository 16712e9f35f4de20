"""The quality of every method on seven tasks, in the same time on the same rows; `docs/results.md` is its table.

Every method gets eight minutes of one core of a Zen 5. A method that learns takes as many steps as fit into them,
which `quality_steps.py` counts; so it can run on any machine, a GPU too, and with more seeds. Few-shot prompts are
searched for by the clock: a fixed amount of training is timed first, and where that takes longer than on the reference
machine, the search gets more time in proportion; `pace` in the result is the factor.

Every result is one file below `results/quality`. Existing results are not computed again, so the program can be
stopped at any time; several processes share the work. Neither texts of the data sets nor completions are stored.

    python benchmarks/quality.py --data FOLDER                           # what is missing
    python benchmarks/quality.py --data FOLDER sst2 cb --methods lora prompt-tuning --seeds 1
    python benchmarks/quality.py --data FOLDER --keep PROMPTS            # and ensembles of whole runs
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/quality.py --data FOLDER --methods few-shot --seeds 1
    python benchmarks/results_page.py                                    # write docs/results.md from what is there

With `--keep`, prompts are saved there, and those of three seeds are also scored as an ensemble, which then took three
times the time (`prompt-tuning-of-3`).

FOLDER holds a folder of `train.jsonl`, `validation.jsonl` and `test.jsonl` for each set: sst2 (Socher et al. 2013),
rte, cb and boolq (of SuperGLUE, Wang et al. 2019), banking77 (Casanueva et al. 2020) and germeval18 (Wiegand et al.
2018) as rows of `text` and `label`, e2e (Novikova et al. 2017) as rows of `input` and `target`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import PromptTuningConfig, TaskType, get_peft_model

import softprompt as sp
from sides import collate, virtual_tokens
from softprompt.comparison.costs import BaseMeasurements
from softprompt.comparison.methods import METHODS
from softprompt.comparison.methods.base import Method, MethodCallback, Predictor
from softprompt.comparison.methods.prompts import PrefixTuning, Prompts, PromptTuning
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.methods.weights import Full, Lora
from softprompt.comparison.protocol import TASKS, Protocol
from softprompt.comparison.results import Result
from softprompt.comparison.run import run_method
from softprompt.data.example import Example
from softprompt.data.split import sample
from softprompt.evaluation.scorer import Scorer
from softprompt.evaluation.scores import Scores
from softprompt.model.frozen import FrozenModel
from softprompt.model.gradient import prompt_gradient
from softprompt.old_names import current_method
from softprompt.prompt.ensemble import make_ensemble
from softprompt.prompt.loading import load_soft_prompt
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.training.callbacks import NO_CALLBACK, Callback
from softprompt.training.prepare import PreparedRun
from softprompt.training.throughput import TIMED_STEPS, TIMING_SHARE, Throughput
from softprompt.training.trainer import MicroBatchesByRank, Trainer, Weights

SETS = ("sst2", "rte", "cb", "boolq", "banking77", "germeval18", "e2e")
SEEDS = 3
MEMBERS = 3  # of an ensemble
MINUTES = 8.0
REFERENCE = 1.95  # seconds that `work` takes on the reference machine
VALIDATION = 200  # rows to choose by: more would take time from learning
FOLDER = Path(__file__).parent / "results" / "quality"
STEPS = FOLDER / "steps.json"
_TRAIN, _TEST = 1000, {"e2e": 300, "banking77": 1000}
_EARLY = 0.1  # of the time


def rows_of(name: str, data: Path) -> tuple[sp.Rows, sp.Rows, sp.Rows]:
    """Return the training, validation and test rows of a set."""

    def read(part: str, most: int | None) -> sp.Rows:
        file = data / name / f"{part}.jsonl"
        return sp.load_data(file if most is None else f"{file}[:{most}]")

    return read("train", _TRAIN), read("validation", 500), read("test", _TEST.get(name))


def apart(validation: sp.Rows) -> tuple[sp.Rows, sp.Rows]:
    """Return the validation rows for a method's own choices, and the others, for choices between methods."""
    some = sample(validation, VALIDATION, 0)
    own = list(some)
    return some, sp.Rows([row for row in validation if row not in own], validation.task, validation.name)


def work(model: FrozenModel, times: int = 1) -> float:
    """Return the time of a step of 16 rows of 40 tokens with a prompt of 20, in seconds, the median of some."""
    rows = [Example(tuple((7919 * row + 104_729 * place) % 40_000 for place in range(40)), 38) for row in range(16)]
    prompt = torch.randn(20, model.embedding_width, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        prompt_gradient(model, prompt, (), [rows], activation_checkpointing=False)
        seconds.append(time.monotonic() - began)
    return median(seconds)


class PeftTrainer(Trainer):
    """Trains a prompt from noise with PEFT's own model, rows padded on the right."""

    def __init__(self, model: FrozenModel, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> None:
        torch.manual_seed(prepared.config.seed)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prepared.start))
        self.peft = get_peft_model(model.hf_model, config)
        self.prompt = virtual_tokens(self.peft)
        super().__init__(model, prepared, {"prompt": self.prompt}, callback=callback)

    def weights(self) -> Weights:
        """Return a copy of the prompt."""
        return {"prompt": self.prompt.detach().clone()}

    def evaluate(self, weights: Weights | None = None, scorer: Scorer | None = None) -> Scores:
        """Score rows with our scorer."""
        scorer = scorer or self.prepared.scorer
        assert scorer is not None
        encoder = self.prepared.encoder
        record = Record.of(self.model, encoder.format, encoder.max_length)
        return scorer.score(self.model, SoftPrompt((weights or self.weights())["prompt"], record))

    def backward(self, cuts: MicroBatchesByRank) -> float:
        """Run the batch at once, as PEFT's users do."""
        ((batch,),) = cuts
        with torch.enable_grad():
            loss: torch.Tensor = self.peft(**{k: v.to(self.model.device) for k, v in collate(batch).items()}).loss
            loss.backward()
        return float(loss.detach())


class PeftAsShipped(Prompts):
    """PEFT's prompt tuning with the settings of its own example (its guide on prompt tuning a causal model).

    8 virtual tokens from N(0, 1), batches of 8, AdamW with a learning rate of 0.03 that falls to zero, the last
    prompt. Scored by our scorer, with the same template.
    """

    rate = 0.03
    settings = {  # noqa: RUF012 - never changed
        "init": "random",
        "loss": "target",
        "num_virtual_tokens": 8,
        "batch_size": 8,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.01,
        "max_grad_norm": 1e9,
        "micro_batch_tokens": 1_000_000,
        "eval_rows": 0,
    }

    def trainer(self, prepared: PreparedRun, callback: Callback = NO_CALLBACK) -> Trainer:
        return PeftTrainer(self.protocol.model, prepared, callback)


SHIPPED = "peft-prompt-tuning"
EARLY: dict[str, type[Method]] = {"prompt-tuning-early": PromptTuning, "prefix-tuning-early": PrefixTuning}
ALL: dict[str, type[Method]] = {**METHODS, SHIPPED: PeftAsShipped, **EARLY}
# What is timed; the others take the same steps.
LEARNING: dict[str, type[Trained]] = {
    "prompt-tuning": PromptTuning,
    "prefix-tuning": PrefixTuning,
    "lora": Lora,
    "full": Full,
    SHIPPED: PeftAsShipped,
}
# The most informative first. The ensembles can no longer be run; their results are still shown.
ORDER = (
    "zero-shot",
    "lora",
    "prompt-tuning",
    "prefix-tuning",
    SHIPPED,
    "few-shot",
    "prefix-tuning-ensemble",
    "prompt-tuning-ensemble",
    "full",
    *EARLY,
)


@dataclass(frozen=True)
class Timed:
    """The costs of a method on a set, in seconds of the reference machine.

    Attributes:
        step: a step.
        evaluation: scoring the validation rows.
        preparation: before the first step.
        row: scoring a validation row.
        peak_bytes: memory above the loaded model.
        pace: the factor by which the machine that timed it is slower.
        last: scoring the validation rows with all of many labels, at the end.
    """

    step: float
    evaluation: float
    preparation: float
    row: float
    peak_bytes: int
    pace: float
    last: float

    def length(self, method: str, rows: int = VALIDATION) -> dict[str, int]:
        """Return the settings for as many steps as fit into the time, with so many validation rows."""
        seconds = 60 * MINUTES
        if method == SHIPPED:  # it measures nothing
            return Throughput(self.step, 0).fit_to_budget(seconds)
        if method in EARLY:  # no validation rows: they would take most of the time
            return {"max_steps": self._within(_EARLY * seconds, 0)["max_steps"], "eval_rows": 0}
        if method.endswith("-ensemble"):
            found = self._within(seconds, rows, MEMBERS)
            return {**found, "max_steps": MEMBERS * found["max_steps"]}
        return self._within(seconds, rows)

    def _within(self, seconds: float, rows: int, members: int = 1) -> dict[str, int]:
        """Return what fits beside preparation and measurement (`measure_throughput`), for each member."""
        steps = 1 + min(TIMED_STEPS, int(TIMING_SHARE * seconds / self.step) + 1)
        throughput = Throughput(self.step, self.evaluation, self.last, rows) if rows else Throughput(self.step, 0.0)
        left = seconds - self.preparation - steps * self.step - throughput.evaluation
        return throughput.fit_to_budget(left if members == 1 else left / members - self.preparation)


def timed() -> dict[str, dict[str, Timed]]:
    """Return the measured times, by set and method."""
    found = json.loads(STEPS.read_text()) if STEPS.exists() else {}
    return {
        name: {current_method(method, quiet=True): _read_timed(record) for method, record in by_method.items()}
        for name, by_method in found.items()
    }


def _read_timed(record: dict[str, Any]) -> Timed:
    return Timed(**{"preparation" if name == "plan" else name: value for name, value in record.items()})


def protocol_of(name: str, method: str, model: FrozenModel, data: Path) -> tuple[Protocol, float | None]:
    """Return a method's protocol on a set, and the machine's pace where the method runs by the clock."""
    train, validation, test = rows_of(name, data)
    some, _ = apart(validation)
    single = next((single for single in LEARNING if method.startswith(single)), None)
    if single is None:
        pace = work(model, times=5) / REFERENCE
        config = sp.TuneConfig(max_minutes=MINUTES * pace, eval_rows=VALIDATION)
        return Protocol(model, train, some, test, config, search=False), pace
    found = timed().get(name, {}).get(single)
    if found is None:
        raise SystemExit(f"{single} on {name} was not timed; run quality_steps.py")
    config = sp.TuneConfig(**{"eval_rows": VALIDATION, **found.length(method, len(some))})
    return Protocol(model, train, some, test, config, "examples", search=False), None


def together(name: str, method: str, model: FrozenModel, test: sp.Rows, prompts: Path) -> None:
    """Score the prompts of several seeds as an ensemble, where all of them exist."""
    found = [read(path_of(name, method, seed)) for seed in range(MEMBERS) if path_of(name, method, seed).exists()]
    folders = [prompts / TASKS / f"{method}-{seed}" for seed in range(MEMBERS)]
    path = path_of(name, of_several(method), 0)
    if path.exists() or len(found) < MEMBERS or not all(folder.exists() for folder in folders):
        return
    ensemble = make_ensemble([load_soft_prompt(folder) for folder in folders], {})
    predictor = Predictor(model, ensemble.format, ensemble.record.max_length, ensemble)
    began = time.monotonic()
    scored = predictor.score(test, predictor.micro_batch_tokens(test))
    summed = ("trainable_parameters", "stored_bytes", "train_seconds", "train_cpu_seconds", "train_tokens")
    costs = {cost: sum(getattr(result.costs, cost) for result in found) for cost in summed}
    costs["prediction_seconds"] = (time.monotonic() - began) / len(test)
    result = found[0].model_copy(
        update={
            "method": of_several(method),
            "metrics": scored.metrics(),
            "statistics": scored.statistics(),
            "costs": found[0].costs.model_copy(update=costs),
            "curve": [],
        }
    )
    path.write_text(json.dumps(shorten(result)) + "\n")
    print(path.stem, {metric: round(value.value, 3) for metric, value in result.metrics.items()}, flush=True)


class Steps(MethodCallback):
    """Prints the validation figures."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        print(f"  step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in values.items()), flush=True)


def of_several(method: str) -> str:
    """Return the name of an ensemble of a method's runs."""
    return f"{method}-of-{MEMBERS}"


def path_of(name: str, method: str, seed: int) -> Path:
    """Return the path of a result; files of earlier versions keep the method's old name."""
    files = (file for file in (FOLDER / name).glob(f"*-{seed}.json") if method_of(file) == method)
    return next(files, FOLDER / name / f"{method}-{seed}.json")


def method_of(file: Path) -> str:
    """Return the method of a result's file."""
    return current_method(file.stem.rpartition("-")[0], quiet=True)


def shorten(result: Result) -> dict[str, Any]:
    """Return a result without predictions, and with shorter statistics."""
    record = result.model_dump(exclude={"predictions", "confusion", "statistics"})
    if result.task == "classification":
        record["right"] = "".join(str(int(right)) for right, _ in result.statistics)
    else:
        record["statistics"] = [[int(number) for number in row] for row in result.statistics]
    return record


def read(path: Path) -> Result:
    """Read what `shorten` returned."""
    record = json.loads(path.read_text())
    right = record.pop("right", None)
    if right is not None:
        record["statistics"] = [[float(bit), 1.0] for bit in right]
    return Result.model_validate(record)


def run(
    name: str, method: str, seed: int, model: FrozenModel, base: BaseMeasurements, data: Path, keep: Path | None
) -> None:
    """Run a method on a set, unless its result exists or another process is computing it."""
    path = path_of(name, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(tempfile.gettempdir()) / f"softprompt-quality-{name}-{method}-{seed}.lock"
    try:
        with FileLock(lock, timeout=0), tempfile.TemporaryDirectory() as scratch:
            if path.exists():
                return
            began = time.monotonic()
            protocol, pace = protocol_of(name, method, model, data)
            print(f"{name} {method} {seed}", flush=True)
            place = keep / name if keep else Path(scratch)
            result = run_method(method, seed, protocol, base, place, Steps(), ALL)
            if pace is not None:
                result.settings["pace"] = pace
            path.write_text(json.dumps(shorten(result)) + "\n")
    except Timeout:
        return
    figures = ", ".join(f"{metric} {found.value:.3f}" for metric, found in result.metrics.items())
    print(f"{name} {method} {seed}: {figures}; {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Run what is requested and missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--methods", nargs="*", choices=list(ALL), default=[m for m in ORDER if m in ALL])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--keep", type=Path, help="a folder for the prompts; those of three seeds become an ensemble")
    options = parser.parse_args()
    model = sp.load_model(dtype="float32")
    base = BaseMeasurements.of(model)
    requested = [(name, method) for method in options.methods for name in options.sets or SETS]
    for seed in range(options.seeds):
        for name, method in requested:
            if not seed or method != "zero-shot":
                run(name, method, seed, model, base, options.data, options.keep)
    for name, method in requested if options.keep else ():
        together(name, method, model, rows_of(name, options.data)[2], options.keep / name)


if __name__ == "__main__":
    main()
