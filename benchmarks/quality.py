"""The quality of every method on seven tasks, in the same time on the same rows; `docs/results.md` is its table.

Machines differ, and so does one machine from hour to hour: what is given to every method is so many minutes of a
reference machine, one core of a Zen 5. Before each run a fixed piece of learning is timed, and where it takes longer
than there, so does the run; `pace` in the result says by how much.

Every result is one file below `results/quality`, and what is there is not run again, so this can be stopped at any
time and goes on with what is missing. The texts of the data sets are not kept, nor what was written from them.
With two threads, whatever else runs on two cores makes a run many times slower; with one it does not, so the results
here are of one thread each, two processes at a time (which do not do the same work if their sets or methods differ):

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/quality.py --data FOLDER    # what is missing
    python benchmarks/quality.py --data FOLDER sst2 cb --methods lora soft-prompt --seeds 3
    python benchmarks/quality.py --data FOLDER sst2 cb --methods soft-prompt --seeds 3 --keep PROMPTS
    python benchmarks/results_page.py                                     # write docs/results.md from what is there

With `--keep`, prompts are kept there, and those of three seeds are also scored as an ensemble, which then had three
times the time (`soft-prompt-of-3`).

FOLDER holds a folder of `train.jsonl`, `validation.jsonl` and `test.jsonl` for each set: sst2 (Socher et al. 2013),
rte, cb and boolq (of SuperGLUE, Wang et al. 2019), banking77 (Casanueva et al. 2020) and germeval18 (Wiegand et al.
2018) as rows of `text` and `label`, e2e (Novikova et al. 2017) as rows of `input` and `target`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

import softprompt as sp
from sides import collate, virtual_tokens
from softprompt.comparison.compare import TASKS, Base, run_method
from softprompt.comparison.costs import measured
from softprompt.comparison.learned_prompts import MEMBERS, DeepPrefixes, SoftPrompts
from softprompt.comparison.method import Answers, Learned, Method, Protocol
from softprompt.comparison.methods import METHODS
from softprompt.comparison.results import Point, Result
from softprompt.data.batching import draw
from softprompt.data.examples import Example
from softprompt.data.split import sample
from softprompt.model.gradient import prompt_gradient
from softprompt.prompt.ensemble import joined
from softprompt.prompt.soft_prompt import load_soft_prompt
from softprompt.training.watcher import Watcher

SETS = ("sst2", "rte", "cb", "boolq", "banking77", "germeval18", "e2e")
MORE_SEEDS = {"sst2": 3, "cb": 3}
MINUTES = 8.0
REFERENCE = 2.0  # seconds that `work` takes on the reference machine
FOLDER = Path(__file__).parent / "results" / "quality"
_TRAIN, _VALIDATION, _TEST = 1000, 500, {"e2e": 300, "banking77": 1000}
_EVALUATIONS = 4
_CHOOSE = 200  # of the validation rows: more would take time from learning


def rows_of(name: str, data: Path) -> tuple[sp.Rows, sp.Rows, sp.Rows]:
    """Return the rows of a set to learn from, to choose by, and to be scored on."""

    def read(part: str, most: int | None) -> sp.Rows:
        file = data / name / f"{part}.jsonl"
        return sp.load_data(file if most is None else f"{file}[:{most}]")

    return read("train", _TRAIN), read("validation", _VALIDATION), read("test", _TEST.get(name))


def work(model: sp.FrozenModel) -> float:
    """Return how many seconds a step of 16 rows of 40 tokens behind a prompt of 20 takes, the median of five."""
    rows = [Example(tuple((7919 * row + 104_729 * place) % 40_000 for place in range(40)), 38) for row in range(16)]
    prompt = torch.randn(20, model.embedding_width, generator=torch.Generator().manual_seed(0))
    taken = []
    for _ in range(6):
        began = time.monotonic()
        prompt_gradient(model, prompt, (), [rows], recompute=False)
        taken.append(time.monotonic() - began)
    return median(taken[1:])  # the first one sets things up


class PeftAsShipped(Method):
    """PEFT's prompt tuning with the settings of its own example (its guide on prompt tuning a causal model).

    8 virtual tokens drawn from N(0, 1), batches of 8, a learning rate of 0.03 that falls to zero, rows padded on the
    right, the last prompt kept. Scored by our scorer, with the same template. Its evaluations are not counted as time.
    """

    def learn(self) -> Learned:
        protocol = self.protocol
        plan = protocol.plan(seed=self.seed, batch_size=8, num_virtual_tokens=8, max_steps=100_000)
        assert plan.scorer is not None
        torch.manual_seed(self.seed)
        model = get_peft_model(
            protocol.model.hf_model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8)
        )
        prompt = virtual_tokens(model)
        optimizer = torch.optim.AdamW([prompt], 0.03)
        curve: list[Point] = []
        with measured(protocol.model.device) as effort:
            spent, step, tokens, due = 0.0, 0, 0, 1
            while spent < protocol.seconds:
                began = time.monotonic()
                batch = [plan.examples[i] for i in draw(len(plan.examples), 8, step, self.seed)]
                optimizer.param_groups[0]["lr"] = 0.03 * max(0.0, 1 - spent / protocol.seconds)
                loss = model(**collate(batch)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                spent, step = spent + time.monotonic() - began, step + 1
                tokens += sum(len(example.ids) for example in batch)
                if spent >= due * protocol.seconds / _EVALUATIONS:
                    due += 1
                    scores = plan.scorer.score(protocol.model, prompt.detach().clone())
                    curve.append(Point(step=step, seconds=spent, loss=float(loss.detach()), validation=scores.values()))
        self._learned = prompt.detach().clone()
        answers = Answers(protocol.model, plan.encoder.format, plan.encoder.max_length, (self._learned,))
        effort.seconds = spent
        settings: dict[str, object] = {
            "max_steps": step,
            "num_virtual_tokens": 8,
            "batch_size": 8,
            "learning_rate": 0.03,
        }
        self._answers = answers
        return Learned(answers, prompt.numel(), effort, tokens, settings, curve)

    def store(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file({"prompt_embeddings": self._learned}, folder / "adapter_model.safetensors")

    def load(self, folder: Path) -> Answers:
        return replace(self._answers, prompts=(load_file(folder / "adapter_model.safetensors")["prompt_embeddings"],))


def early(protocol: Protocol) -> Protocol:
    """Return a protocol with a tenth of the time, and no rows to choose by: that would take most of it."""
    settings = {"max_minutes": protocol.seconds / 60 / 10, "eval_rows": 0}
    return replace(protocol, config=protocol.config.model_copy(update=settings))


SHIPPED = "peft-prompt-tuning"
EARLY: dict[str, type[Method]] = {"soft-prompt-early": SoftPrompts, "deep-prefix-early": DeepPrefixes}
ALL: dict[str, type[Method]] = {**METHODS, SHIPPED: PeftAsShipped, **EARLY}
# In the order in which they tell most, should there be no time for all.
ORDER = (
    "zero-shot",
    "lora",
    "soft-prompt",
    "deep-prefix",
    SHIPPED,
    "few-shot",
    "deep-prefix-ensemble",
    "soft-prompt-ensemble",
    "full",
    *EARLY,
)


def together(name: str, method: str, model: sp.FrozenModel, test: sp.Rows, kept_in: Path) -> None:
    """Score the prompts of several seeds as an ensemble, where all of them are there."""
    found = [read(path_of(name, method, seed)) for seed in range(MEMBERS) if path_of(name, method, seed).exists()]
    folders = [kept_in / TASKS / f"{method}-{seed}" for seed in range(MEMBERS)]
    path = path_of(name, of_several(method), 0)
    if path.exists() or len(found) < MEMBERS or not all(folder.exists() for folder in folders):
        return
    ensemble = joined([load_soft_prompt(folder) for folder in folders], {})
    answers = Answers(model, ensemble.format, ensemble.record.max_length, ensemble.members)
    began = time.monotonic()
    side = answers.side(test, answers.at_once(test))
    summed = ("trainable_parameters", "stored_bytes", "train_seconds", "train_cpu_seconds", "train_tokens")
    costs = {cost: sum(getattr(result.costs, cost) for result in found) for cost in summed}
    costs["prediction_seconds"] = (time.monotonic() - began) / len(test)
    result = found[0].model_copy(
        update={
            "method": of_several(method),
            "metrics": side.metrics(),
            "statistics": side.statistics(),
            "costs": found[0].costs.model_copy(update=costs),
            "curve": [],
        }
    )
    path.write_text(json.dumps(kept(result)) + "\n")
    print(path.stem, {metric: round(value.value, 3) for metric, value in result.metrics.items()}, flush=True)


class Steps(Watcher):
    """Prints the validation figures as they come."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        print(f"  step {step}:", ", ".join(f"{name} {value:.3f}" for name, value in values.items()), flush=True)


def of_several(method: str) -> str:
    """Return what an ensemble of a method's runs is called."""
    return f"{method}-of-{MEMBERS}"


def path_of(name: str, method: str, seed: int) -> Path:
    """Return where a result is kept."""
    return FOLDER / name / f"{method}-{seed}.json"


def kept(result: Result) -> dict[str, Any]:
    """Return a result without what was written from the data sets, and with its statistics in short."""
    record = result.model_dump(exclude={"predictions", "confusion", "statistics"})
    if result.task == "classification":
        record["right"] = "".join(str(int(right)) for right, _ in result.statistics)
    else:
        record["statistics"] = [[int(number) for number in row] for row in result.statistics]
    return record


def read(path: Path) -> Result:
    """Read what `kept` wrote."""
    record = json.loads(path.read_text())
    right = record.pop("right", None)
    if right is not None:
        record["statistics"] = [[float(bit), 1.0] for bit in right]
    return Result.model_validate(record)


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--methods", nargs="*", choices=list(ALL), default=ORDER)
    parser.add_argument("--seeds", type=int, help=f"default: 1, but {MORE_SEEDS}")
    parser.add_argument("--keep", type=Path, help="a folder to keep prompts in; three seeds' become an ensemble")
    options = parser.parse_args()
    model = sp.load_model()
    base = Base(model)
    for method in options.methods:
        for name in options.sets or SETS:
            for seed in range(1 if method == "zero-shot" else options.seeds or MORE_SEEDS.get(name, 1)):
                path = path_of(name, method, seed)
                if path.exists():
                    continue
                began = time.monotonic()
                pace = work(model) / REFERENCE
                config = sp.TuneConfig(max_minutes=MINUTES * pace, eval_rows=_CHOOSE)
                train, validation, test = rows_of(name, options.data)
                protocol = Protocol(model, train, sample(validation, _CHOOSE, 0), test, config, search=False)
                protocol = early(protocol) if method in EARLY else protocol
                print(f"{name} {method} {seed}, pace {pace:.2f}", flush=True)
                with tempfile.TemporaryDirectory() as scratch:
                    place = options.keep / name if options.keep else Path(scratch)
                    result = run_method(method, seed, protocol, base, place, Steps(), ALL)
                result.settings["pace"] = pace
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(kept(result)) + "\n")
                figures = ", ".join(f"{n} {m.value:.3f}" for n, m in result.metrics.items())
                print(f"{name} {method} {seed}: {figures}; {time.monotonic() - began:.0f} s", flush=True)
            if options.keep:
                together(name, method, model, rows_of(name, options.data)[2], options.keep / name)


if __name__ == "__main__":
    main()
