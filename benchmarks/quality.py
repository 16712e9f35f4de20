"""The quality of every method on seven tasks, in the same time on the same rows; `docs/results.md` is its table.

Every result is one file below `results/quality`, and what is there is not run again, so this can be stopped at any
time and goes on with what is missing. The texts of the data sets are not kept, nor what was written from them.

    python benchmarks/quality.py --data FOLDER                            # what is missing, of all sets and methods
    python benchmarks/quality.py --data FOLDER sst2 cb --methods lora soft-prompt --seeds 3
    python benchmarks/quality.py --table                                  # write docs/results.md from what is there

FOLDER holds a folder of `train.jsonl`, `validation.jsonl` and `test.jsonl` for each set: sst2 (Socher et al. 2013),
rte, cb and boolq (of SuperGLUE, Wang et al. 2019), banking77 (Casanueva et al. 2020) and germeval18 (Wiegand et al.
2018) as rows of `text` and `label`, e2e (Novikova et al. 2017) as rows of `input` and `target`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

import softprompt as sp
from sides import collate, virtual_tokens
from softprompt.comparison.costs import measured
from softprompt.comparison.methods import METHODS, Answers, Learned, Method
from softprompt.comparison.results import Point
from softprompt.data.batching import draw

SETS = ("sst2", "rte", "cb", "boolq", "banking77", "germeval18", "e2e")
MORE_SEEDS = {"sst2": 3, "cb": 3}
MINUTES = 4.0
FOLDER = Path(__file__).parent / "results" / "quality"
_TRAIN, _VALIDATION, _TEST = 1000, 500, {"e2e": 300}
_EVALUATIONS = 10


def rows_of(name: str, data: Path) -> tuple[sp.Rows, sp.Rows, sp.Rows]:
    """Return the rows of a set to learn from, to choose by, and to be scored on."""

    def read(part: str, most: int | None) -> sp.Rows:
        file = data / name / f"{part}.jsonl"
        return sp.load_data(file if most is None else f"{file}[:{most}]")

    return read("train", _TRAIN), read("validation", _VALIDATION), read("test", _TEST.get(name))


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
        learned = prompt.detach().clone()
        self._answers = Answers(protocol.model, plan.encoder.format, plan.encoder.max_length, (learned,))
        effort.seconds = spent
        settings = {"max_steps": step, "num_virtual_tokens": 8, "batch_size": 8, "learning_rate": 0.03}
        return Learned(self._answers, prompt.numel(), effort, tokens, settings, curve)

    def store(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save({}, folder / "nothing") if False else (folder / "prompt").write_bytes(
            self._answers.prompts[0].numpy().tobytes()
        )

    def load(self, folder: Path) -> Answers:
        return self._answers


SHIPPED = "peft-prompt-tuning"
ALL = {**METHODS, SHIPPED: PeftAsShipped}
