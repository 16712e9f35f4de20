"""How fast a step is, against PEFT and against the arithmetic that it needs.

    python benchmarks/speed.py --data FOLDER            # all cases
    python benchmarks/speed.py --data FOLDER A1 C       # some

PEFT runs in a plain PyTorch loop and, the tutorial's way, under `transformers.Trainer`. All sides run in one process,
a step each in turn, on the same rows in the same batches, from the same initial prompt,
with the same optimizer; a case fails if their losses or the first gradients differ. Peak memory is taken in a process
of its own for each side. A case's results replace the older ones in `results/speed.jsonl`; `results/speed.md` is the
table of what is there.

FOLDER holds `sst2/{train,validation}.jsonl` (Stanford Sentiment Treebank, binary sentences; rows of text and label),
`banking77/test.jsonl` (Casanueva et al. 2020; likewise), `e2e/train.jsonl` (Novikova et al. 2017; rows of input and
target) and `awesome-chatgpt-prompts/prompts.csv` (github.com/f/awesome-chatgpt-prompts, March 2023).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import softprompt as sp
from arithmetic import bound, needed_seconds
from softprompt.data.batching import draw
from softprompt.data.examples import Example
from softprompt.model.choice import freeze
from softprompt.training.loop import Loop
from softprompt.training.plan import Plan, make_plan
from softprompt.training.run_folder import RunFolder, environment
from softprompt.training.tune import reproducible
from softprompt.training.watcher import Watcher

RESULTS = Path(__file__).parent / "results"
LOSSES_AGREE, GRADIENTS_AGREE = 1e-3, 1e-4
SIDES = ("softprompt", "peft", "trainer")


@dataclass(frozen=True)
class Case:
    """A training case.

    Attributes:
        model: `smollm2` or `bloom`, the latter with bloomz-560m's shape, random weights and SmolLM2's tokenizer.
        rows: reads the training rows from the folder of data sets.
        faster: by at least this factor than PEFT in a plain loop.
        memory: at most this share of PEFT's peak above the loaded model; None where it is only reported.
    """

    model: str
    rows: Callable[[Path], sp.Rows]
    batch_size: int
    num_virtual_tokens: int
    faster: float
    memory: float | None = None


def sst2(data: Path) -> sp.Rows:
    """Film reviews; the loss is over the label."""
    return sp.load_data(data / "sst2/train.jsonl")


def prompts(data: Path) -> sp.Rows:
    """The tutorial's rows; the loss is over all tokens."""
    return sp.load_data(f"{data}/awesome-chatgpt-prompts/prompts.csv[:50]", {"text": "prompt"})


def e2e(data: Path) -> sp.Rows:
    """Restaurants; the loss is over the sentence to write."""
    return sp.load_data(data / "e2e/train.jsonl")


CASES = {
    "A1": Case("smollm2", sst2, 32, 20, 2.5),
    "A2": Case("smollm2", sst2, 32, 100, 6, 0.25),
    "B1": Case("bloom", sst2, 16, 20, 3),
    "B2": Case("bloom", sst2, 16, 100, 6.5, 0.25),
    "C": Case("bloom", prompts, 8, 4, 1.15, 0.5),
    "D": Case("smollm2", e2e, 32, 20, 1.7),
}


def load(name: str) -> sp.FrozenModel:
    """Return a base model."""
    if name == "smollm2":
        return sp.load_model()
    tokenizer = sp.load_model().tokenizer
    torch.manual_seed(0)
    shape = BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16)
    return freeze(BloomForCausalLM(shape), tokenizer, source="bloomz-560m's shape, random weights")


def plan_of(case: Case, model: sp.FrozenModel, data: Path, steps: int) -> Plan:
    """Return what is learned from; all sides take rows, ids and the initial prompt from it."""
    settings = sp.TuneConfig(
        num_virtual_tokens=case.num_virtual_tokens,
        batch_size=case.batch_size,
        max_steps=steps,
        eval_rows=0,
        warmup_ratio=0,
        schedule="constant",
    )
    return make_plan(model, case.rows(data), settings)


class Softprompt:
    """Our side: the loop that `softprompt tune` runs."""

    def __init__(self, model: sp.FrozenModel, plan: Plan, scratch: Path) -> None:
        run = RunFolder(scratch / "run")
        run.begin(plan.config, {})
        self.loop, self.metrics = Loop(model, plan, run, Watcher(), None), run.path / "metrics.jsonl"

    def step(self, _batch: Sequence[Example]) -> float:
        """Take a step and return its loss; the loop draws the same batch itself."""
        with reproducible(self.loop.plan.config.threads):
            self.loop.step()
        return float(json.loads(self.metrics.read_text().splitlines()[-1])["loss"])

    def gradient(self) -> Tensor:
        """Return the last step's gradient `[P, H]`, clipped."""
        assert self.loop.prompt.grad is not None
        return self.loop.prompt.grad.clone()


class Peft:
    """PEFT's prompt tuning in a plain PyTorch loop: rows padded on the right to the batch's longest."""

    def __init__(self, hf_model: PreTrainedModel, plan: Plan) -> None:
        self.config = plan.config
        assert plan.config.learning_rate
        self.model = peft_model(hf_model, plan.start)
        self.prompt = virtual_tokens(self.model)
        self.optimizer = torch.optim.AdamW(
            [self.prompt], plan.config.learning_rate, weight_decay=plan.config.weight_decay
        )

    def step(self, batch: Sequence[Example]) -> float:
        """Take a step and return its loss."""
        self.optimizer.zero_grad()
        loss = self.model(**collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.prompt], self.config.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())

    def gradient(self) -> Tensor:
        """Return the last step's gradient `[P, H]`, clipped."""
        assert self.prompt.grad is not None
        return self.prompt.grad.clone()


def virtual_tokens(model: PeftModel) -> torch.nn.Parameter:
    """Return what PEFT trains, `[P, H]`."""
    (prompt,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return prompt


def peft_model(hf_model: PreTrainedModel, prompt: Tensor) -> PeftModel:
    """Wrap a model with PEFT's prompt tuning, starting from a given prompt `[P, H]`."""
    wrapped = get_peft_model(hf_model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt)))
    virtual_tokens(wrapped).data.copy_(prompt)
    return wrapped


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """Pad a batch on the right; only targets are labels."""
    longest = max(len(e.ids) for e in batch)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([e.ids for e in batch], 0),
        "attention_mask": padded([[1] * len(e.ids) for e in batch], 0),
        "labels": padded([[*[-100] * e.start, *e.ids[e.start :]] for e in batch], -100),
    }


class Rounds(TrainerCallback):
    """Times the Trainer's steps, and before each of them lets the other sides take theirs."""

    def __init__(self, others: Callable[[int], None]) -> None:
        self.others, self.seconds, self.losses, self._began = others, list[float](), list[float](), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the others, then start the clock."""
        self.others(state.global_step)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the loss."""
        if "loss" in kwargs["logs"]:
            self.losses.append(float(kwargs["logs"]["loss"]))


def trainer(hf_model: PreTrainedModel, plan: Plan, batches: Sequence[Sequence[Example]], scratch: Path) -> Trainer:
    """Return the tutorial's way: PEFT under `transformers.Trainer`, with the batches in the given order."""
    config = plan.config
    assert config.learning_rate and config.batch_size
    arguments = TrainingArguments(
        output_dir=str(scratch),
        use_cpu=True,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="constant",
        max_steps=len(batches),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    rows = [example for batch in batches for example in batch]
    return Trainer(peft_model(hf_model, plan.start), arguments, collate, rows)


def measure(name: str, data: Path, steps: int) -> dict[str, Any]:
    """Run a case and return what was seen; the first of its steps warms up and is not counted."""
    case = CASES[name]
    model = load(case.model)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plan = plan_of(case, model, data, 1 + steps)
        batches = [batch_of(plan, step) for step in range(1 + steps)]
        ours, theirs = Softprompt(model, plan, scratch), Peft(model.hf_model, plan)
        seconds: dict[str, list[float]] = {"softprompt": [], "peft": [], "needed": []}
        losses: dict[str, list[float]] = {"softprompt": [], "peft": []}
        gradients: list[float] = []

        def one_round(step: int) -> None:
            model.hf_model.eval()  # the Trainer puts it in training mode
            for label, side in (("softprompt", ours), ("peft", theirs)):
                began = time.perf_counter()
                losses[label].append(side.step(batches[step]))
                seconds[label].append(time.perf_counter() - began)
            seconds["needed"].append(needed_seconds(model, plan, batches[step]))
            gradients.append(float((ours.gradient() - theirs.gradient()).norm() / theirs.gradient().norm()))

        rounds = Rounds(one_round)
        tutorial = trainer(model.hf_model, plan, batches, scratch / "trainer")
        tutorial.add_callback(rounds)
        tutorial.train()
    seconds["trainer"], losses["trainer"] = rounds.seconds, rounds.losses[: len(batches)]
    apart = max(
        abs(a - b) / abs(b)
        for side in ("peft", "trainer")
        for a, b in zip(losses["softprompt"], losses[side], strict=True)
    )
    if apart > LOSSES_AGREE or gradients[0] > GRADIENTS_AGREE:
        raise SystemExit(f"{name}: losses differ by {apart:.1e}, gradients by {gradients[0]:.1e}: {losses}")
    times = {side: each[1:] for side, each in seconds.items()}
    return {
        "case": name,
        "settings": {"batch_size": case.batch_size, "num_virtual_tokens": case.num_virtual_tokens},
        "micro_batch_tokens": ours.loop.progress.micro_batch_tokens,
        "seconds": {side: [round(s, 3) for s in each] for side, each in times.items()},
        "faster": ratio(times["peft"], times["softprompt"]),
        "faster_than_trainer": ratio(times["trainer"], times["softprompt"]),
        "bound": statistics.mean(bound(model, plan, batch) for batch in batches[1:]),
        "over_needed": ratio(times["softprompt"], times["needed"]),
        "losses_differ": apart,
        "gradients_differ": gradients[0],
    }


def batch_of(plan: Plan, step: int) -> list[Example]:
    """Return a step's examples, as the loop draws them."""
    assert plan.config.batch_size
    return [plan.examples[i] for i in draw(len(plan.examples), plan.config.batch_size, step, plan.config.seed)]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak(name: str, side: str, data: Path) -> float:
    """Return the gigabytes that two steps of one side take above the loaded model, at most."""
    command = [sys.executable, __file__, "--data", str(data), "--memory-of", side, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def memory_of(name: str, side: str, data: Path) -> float:
    """Take two steps in this process, and return the peak of its memory above the loaded model, in gigabytes."""
    case = CASES[name]
    model = load(case.model)
    plan = plan_of(case, model, data, 2)
    with tempfile.TemporaryDirectory() as folder:
        loaded = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        taken = Softprompt(model, plan, Path(folder)) if side == "softprompt" else Peft(model.hf_model, plan)
        for step in range(2):
            taken.step(batch_of(plan, step))
    return (resident("VmHWM") - loaded) / 1e9


def resident(which: str) -> int:
    """Return the bytes of this process that lie in memory, now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Speed of training",
        "",
        "Made by `benchmarks/speed.py`, which says how. *Faster* is PEFT's time over ours, the median over the steps; "
        "*bound* is the ratio of the arithmetic; *over needed* is our time over the time that the needed matrix "
        "products alone take. Memory is the peak above the loaded model.",
        "",
        "| case | PEFT | Trainer | ours | faster | target | bound | than Trainer | over needed | memory: PEFT | ours |",
        "|---" * 11 + "|",
    ]
    for name, case in CASES.items():
        if name not in records:
            continue
        r = records[name]
        peft, tutorial, ours = (statistics.median(r["seconds"][s]) for s in ("peft", "trainer", "softprompt"))
        memory = r["memory_gigabytes"]
        lines.append(
            f"| {name} | {peft:.1f} s | {tutorial:.1f} s | {ours:.2f} s | **{r['faster']:.2f}** | {case.faster} | "
            f"{r['bound']:.1f} | {r['faster_than_trainer']:.2f} | {r['over_needed']:.2f} | {memory['peft']:.1f} GB | "
            f"{memory['softprompt']:.1f} GB |"
        )
    first = next(iter(records.values()))
    lines += ["", f"{first['date']}, {first['cores']} cores, {first['environment']}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, of each side")
    parser.add_argument("--memory-of", choices=SIDES[:2], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(options.cases[0], options.memory_of, options.data))
        return
    file = RESULTS / "speed.jsonl"
    records = {}
    if file.exists():
        records = {r["case"]: r for r in map(json.loads, file.read_text().splitlines())}
    for name in options.cases or CASES:
        record = measure(name, options.data, options.steps)
        record["memory_gigabytes"] = {side: round(peak(name, side, options.data), 2) for side in ("softprompt", "peft")}
        records[name] = {
            **record,
            "cores": os.cpu_count(),
            "date": date.today().isoformat(),
            "environment": environment(),
        }
        file.write_text("".join(json.dumps(r) + "\n" for r in records.values()))
        (RESULTS / "speed.md").write_text(table(records))
        print(json.dumps(record), flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
