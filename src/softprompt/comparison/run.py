"""The comparison as a whole: every method and seed under one protocol; a result is written as soon as it is there."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from softprompt.comparison import USUAL
from softprompt.comparison.costs import BaseMeasurements, general_perplexity, weights_hash
from softprompt.comparison.methods import METHODS, resolve_methods
from softprompt.comparison.methods.base import FitResult, Method, MethodCallback
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.protocol import (
    RESULTS,
    TASKS,
    Equal,
    Protocol,
    make_protocol,
    require_comparison,
    write_protocol,
)
from softprompt.comparison.report.page import write_report
from softprompt.comparison.results import Costs, Result, read_result, rejudge
from softprompt.config import TuneConfig
from softprompt.data.rows import Row, Rows, Source, as_rows
from softprompt.data.templates import make_format
from softprompt.distributed.signals import defer_signals, save_before_exit
from softprompt.errors import ModelError, RunError, SettingsError, is_out_of_memory
from softprompt.evaluation.evaluate import ScoredRows
from softprompt.evaluation.primary_metric import PRIMARY
from softprompt.extras import require_package
from softprompt.model.frozen import FrozenModel
from softprompt.storage import clean_up, lock_folder, require_unlocked, storage_errors
from softprompt.training.run_folder import environment

_WITHOUT_SEED = ("zero-shot",)  # the result is the same with every seed
_SWITCHES = 3  # the time to switch tasks is the median of so many


class ComparisonCallback:
    """Told of a comparison's course; this one shows nothing."""

    def begin(self, protocol: Protocol, done: Sequence[Result], todo: Sequence[tuple[str, int]]) -> None:
        """The rows are split; some results were there before."""

    def method(self, name: str, seed: int) -> MethodCallback:
        """A method begins; the callback that is returned is told of its course."""
        return MethodCallback()

    def result(self, result: Result) -> None:
        """A method is done."""

    def failed(self, name: str, seed: int, reason: str) -> None:
        """A method failed; the others still run."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave.

    Attributes:
        results: one per method and seed: those asked for, in the order of the methods, then others of the folder.
        rows: the test rows.
        report: the HTML page, None where nothing was to be written.
    """

    results: list[Result]
    rows: list[Row]
    report: Path | None


def compare(
    model: FrozenModel,
    data: Source,
    *,
    methods: Sequence[str] = USUAL,
    seeds: int = 1,
    out: str | Path | None = None,
    eval_data: Source | None = None,
    test_data: Source | None = None,
    config: TuneConfig | None = None,
    equal: Equal = "time",
    search: bool = True,
    callback: ComparisonCallback | None = None,
) -> Comparison:
    """Measure quality and cost of prompt engineering, prompt tuning, LoRA and fine-tuning on the same rows.

    Args:
        model: the base model; its weights are unchanged afterwards.
        data: rows to learn from, or what `load_data` reads. Without `test_data`, a fifth becomes test rows; without
            `eval_data`, a fifth of the rest, `eval_rows` at most, becomes validation rows.
        methods: which.
        seeds: runs of each method that depends on chance.
        out: folder of the results and the report. Results that are there are not computed again, and the report shows
            all of them. None writes nothing.
        eval_data, test_data: validation rows, and rows that are used for the final figures alone.
        config: settings, for all methods; `max_minutes` is the budget of each, and `max_steps` where `equal` is
            `examples`. The seed is the split's; methods count theirs from 0.
        equal: whether all methods get the same wall time, or see the same number of examples.
        search: whether trained methods spend a part of their budget on a search for the learning rate; not where the
            settings name one.
        callback: told of every method.

    Raises:
        InputError: what was given does not fit together, or `out` holds another comparison.
        RunError: a loss is not finite, or one row does not fit in memory.
        StorageError: a file cannot be written.
    """
    methods = resolve_methods(methods)
    _require_methods_fit(model, methods, config, plots=out is not None)
    data = as_rows(data)
    eval_rows, test_rows = (None if rows is None else as_rows(rows, data.task) for rows in (eval_data, test_data))
    protocol = make_protocol(model, data, eval_rows, test_rows, config or TuneConfig(), equal, search)
    callback = callback or ComparisonCallback()
    with ExitStack() as stack:
        stack.enter_context(save_before_exit())
        folder = Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        require_unlocked(folder)
        require_comparison(folder)  # before the lock is written into it
        stack.enter_context(lock_folder(folder))
        for place in (folder, folder / RESULTS, folder / TASKS):
            clean_up(place)
        write_protocol(folder, protocol)
        requested = [(name, seed) for name in methods for seed in range(1 if name in _WITHOUT_SEED else seeds)]
        results = {(result.method, result.seed): result for result in _read_results(folder, protocol)}
        todo, order = [key for key in requested if key not in results], list(dict.fromkeys([*requested, *results]))
        callback.begin(protocol, list(results.values()), todo)
        rows, report = list(protocol.test), None
        try:
            failures = _run_methods(todo, protocol, folder, callback, results)
        finally:  # an interrupted comparison has a report too
            found = [results[key] for key in order if key in results]
            if out is not None and found:
                with defer_signals():
                    report = write_report(found, rows, folder)
        if failures:
            raise RunError("; ".join([*failures, "the report has the others, and the same command tries these again"]))
    return Comparison(found, rows, report)


def _require_methods_fit(model: FrozenModel, methods: Sequence[str], config: TuneConfig | None, plots: bool) -> None:
    """Report at once, not after hours, which method cannot run or which package is missing."""
    if plots:
        require_package("matplotlib", "the report")
    if "lora" in methods:
        require_package("peft", "lora")
    if "full" in methods and getattr(model.hf_model, "is_quantized", False):
        raise SettingsError("full fine-tuning needs a model that is not quantized; leave the method or the setting out")
    if "prefix-tuning" in methods:
        try:
            _ = model.prefix_shape
        except ModelError as error:
            raise SettingsError(f"{error}; leave prefix-tuning out of --methods") from error
    kinds = {METHODS[name].changes_weights for name in methods if issubclass(METHODS[name], Trained)}
    if config is not None and config.learning_rate is not None and len(kinds) > 1:
        raise SettingsError(
            "learning_rate: prompts and weights need different ones; leave it out, or compare one kind at a time"
        )


def _read_results(folder: Path, protocol: Protocol) -> list[Result]:
    """Read the results of a folder; completions are judged like those that are still to come."""
    results = [read_result(file) for file in sorted((folder / RESULTS).glob("*.json"))]
    if protocol.test.task != "completion":
        return results
    config = protocol.config
    form = make_format("completion", [], config.template, None, bool(config.chat_template))
    return [result if result.ranked_by else rejudge(result, form, protocol.test) for result in results]


def _run_methods(
    todo: Sequence[tuple[str, int]],
    protocol: Protocol,
    folder: Path,
    callback: ComparisonCallback,
    results: dict[tuple[str, int], Result],
) -> list[str]:
    """Run methods, add and write each result, and return which methods failed and why."""
    base, failures = BaseMeasurements.of(protocol.model) if todo else None, []
    for name, seed in todo:
        assert base is not None
        try:
            result = run_method(name, seed, protocol, base, folder, callback.method(name, seed))
        except Exception as error:
            if not (isinstance(error, RunError) or is_out_of_memory(error)):
                raise
            reason = str(error) or "out of memory"
            failures.append(f"{name}, seed {seed}: {reason}")
            callback.failed(name, seed, reason)
            continue
        result.save(folder / RESULTS)
        results[name, seed] = result
        callback.result(result)
    return failures


def run_method(
    name: str,
    seed: int,
    protocol: Protocol,
    base: BaseMeasurements,
    folder: Path,
    callback: MethodCallback,
    methods: Mapping[str, type[Method]] = METHODS,
) -> Result:
    """Fit a method, score the test rows with it, and measure its costs."""
    gc.collect()  # the method before may have left a copy of the model in reference cycles
    method = methods[name](protocol, seed, callback)
    try:
        fitted = method.fit()
        predictor = fitted.predictor
        at_once = predictor.micro_batch_tokens(protocol.test)
        perplexity = general_perplexity(predictor.model) if method.changes_weights else base.perplexity
        began = time.monotonic()
        scored = predictor.score(protocol.test, at_once)
        seconds = time.monotonic() - began
        with tempfile.TemporaryDirectory() as scratch:
            place = folder / TASKS / f"{name}-{seed}" if method.keeps else Path(scratch) / "task"
            with storage_errors(place):
                method.store(place)
            stored = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            switch = _switch_seconds(method, place, protocol.test, at_once)
    finally:
        method.close()
    costs = Costs(
        trainable_parameters=fitted.parameters,
        stored_bytes=stored,
        train_seconds=fitted.effort.seconds,
        train_cpu_seconds=fitted.effort.cpu_seconds,
        train_tokens=fitted.tokens,
        peak_bytes=fitted.effort.peak_bytes,
        prediction_seconds=seconds / len(protocol.test),
        switch_seconds=switch,
        # LoRA's adapter is out of the model again.
        base_unchanged=weights_hash(predictor.model.hf_model) == base.weights_hash,
        perplexity_before=base.perplexity,
        perplexity_after=perplexity,
    )
    return _result(name, seed, protocol, fitted, scored, costs)


def _switch_seconds(method: Method, folder: Path, rows: Rows, at_once: int) -> float:
    """Return the time from the stored files to the first answer; the base model is in memory."""
    times = []
    for _ in range(_SWITCHES):
        began = time.monotonic()
        method.load(folder).score(rows.pick([0]), at_once)
        times.append(time.monotonic() - began)
    return float(np.median(times))


def _last_part(name: str) -> str:
    """Return the name of a file or folder without its path: reports are sent to others."""
    return name if name.startswith("hub:") else Path(name).name


def _result(name: str, seed: int, protocol: Protocol, fitted: FitResult, scored: ScoredRows, costs: Costs) -> Result:
    source = protocol.model.source
    minutes = protocol.config.max_minutes if protocol.equal == "time" else None
    parts = {"train": protocol.train, "validation": protocol.validation, "test": protocol.test}
    return Result(
        method=name,
        seed=seed,
        task=protocol.test.task,
        data=_last_part(protocol.train.name),
        base_model=_last_part(source) if Path(source).is_dir() else source,
        rows={part: len(rows) for part, rows in parts.items()},
        settings={**fitted.settings, "equal": protocol.equal, "max_minutes": minutes},
        metrics=scored.metrics(),
        confusion=scored.scores.confusion(),
        predictions=scored.answers(),
        ranked_by=scored.completions.ranked_by if scored.completions else PRIMARY[protocol.test.task],
        statistics=scored.statistics(),
        costs=costs,
        curve=fitted.curve,
        environment=environment(),
        date=date.today().isoformat(),
    )
