"""The comparison as a whole: every method and seed under one protocol, each kept as soon as it is done."""

from __future__ import annotations

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from softprompt.comparison import USUAL
from softprompt.comparison.costs import folder_bytes, general_perplexity, weights_hash
from softprompt.comparison.methods import METHODS
from softprompt.comparison.methods.base import Equal, FitResult, Method, Protocol
from softprompt.comparison.methods.prompts import Ensembles, PrefixTuning, PrefixTuningEnsembles
from softprompt.comparison.methods.trained import Trained
from softprompt.comparison.methods.weights_trainer import require_whole
from softprompt.comparison.report.page import MARKDOWN, PAGE, PICTURE, write_report
from softprompt.comparison.results import Costs, Result, judged_anew, read_result
from softprompt.config import PROMPT, TuneConfig
from softprompt.data.encoder import Encoder
from softprompt.data.rows import Row, Rows, Source, as_rows
from softprompt.data.split import count_duplicates, sample, split_rows
from softprompt.data.templates import make_format
from softprompt.distributed.launch import count
from softprompt.distributed.signals import interrupts_deferred, saves_before_it_ends
from softprompt.errors import DataError, InputError, ModelError, RunError, SettingsError, is_out_of_memory, nearest
from softprompt.evaluation.evaluate import ScoredRows
from softprompt.evaluation.primary_metric import PRIMARY
from softprompt.extras import require_package
from softprompt.locks import LOCK, locked, require_free
from softprompt.model.fingerprint import AnyFingerprint, difference, fingerprint
from softprompt.model.frozen import FrozenModel
from softprompt.old_names import current_method, current_settings
from softprompt.storage import MARK, read_json_object, storage_errors, sweep, write_records, write_text
from softprompt.training.callbacks import Callback
from softprompt.training.run_folder import environment

MINUTES = {"quick": 1.0, "normal": 5.0, "thorough": 15.0}
_SAME = ("zero-shot",)  # with every seed
_SWITCHED = 3  # times; the median counts
_DAMAGED = "give another folder, or remove this one: what was done so far cannot be told to be of these rows"
RESULTS, TASKS, ROWS, PROTOCOL = "results", "tasks", "test-rows.jsonl", "protocol.json"


class ComparisonCallback:
    """Told of a comparison's course; this one shows nothing."""

    def begin(self, protocol: Protocol, done: Sequence[Result], todo: Sequence[tuple[str, int]]) -> None:
        """The rows are split; some results were there before."""

    def method(self, name: str, seed: int) -> Callback:
        """A method begins; the watcher that is returned is told of its steps."""
        return Callback()

    def result(self, result: Result) -> None:
        """A method is done."""

    def failed(self, name: str, seed: int, reason: str) -> None:
        """A method could not be run; the others are."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave.

    Attributes:
        results: one a method and seed: those asked for, in the order of the methods, then others of the folder.
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
    """Measure what prompt engineering, prompt tuning, LoRA and fine-tuning give on the same rows, and what they take.

    Args:
        model: the base model; it is as it was afterwards.
        data: rows to learn from, or what `load_data` reads; where no other rows are given, a fifth is held back for the
            test and a fifth of the rest, `eval_rows` at most, to choose by.
        methods: which.
        seeds: runs of each method that depends on chance.
        out: folder of the results and the report; what is finished there is not run again, and the report has all of
            it, asked for now or before. None keeps nothing.
        eval_data, test_data: rows to choose by, and rows that play no part but in the figures.
        config: settings, for all methods; `max_minutes` is the budget of each, and `max_steps` where `equal` is
            `examples`. The seed is the split's; methods count theirs from 0.
        equal: whether all methods get the same wall time, or see the same number of examples.
        search: whether trained methods spend a part of their budget on finding the learning rate; not where the
            settings name one.
        callback: told of every method.

    Raises:
        InputError: what was given does not fit together, or `out` holds another comparison.
        RunError: a loss is not finite, or one row does not fit in memory.
        StorageError: a file cannot be written.
    """
    methods = [current_method(name) for name in methods]
    _require(model, methods, config, plots=out is not None)
    data = as_rows(data)
    held, test = (None if rows is None else as_rows(rows, data.task) for rows in (eval_data, test_data))
    protocol = _protocol(model, data, held, test, config or TuneConfig(), equal, search)
    callback = callback or ComparisonCallback()
    with ExitStack() as stack:
        stack.enter_context(saves_before_it_ends())
        folder = Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        require_free(folder)
        require_ours(folder)  # nothing is put into a folder of something else
        stack.enter_context(locked(folder))
        for place in (folder, folder / RESULTS, folder / TASKS):
            sweep(place)
        _begin(folder, protocol)
        asked = [(name, seed) for name in dict.fromkeys(methods) for seed in range(1 if name in _SAME else seeds)]
        kept = [_judged(read_result(file), protocol) for file in sorted((folder / RESULTS).glob("*.json"))]
        results = {(result.method, result.seed): result for result in kept}
        every = list(dict.fromkeys([*asked, *results]))
        todo = [key for key in asked if key not in results]
        callback.begin(protocol, list(results.values()), todo)
        base, failed = Base(model) if todo else None, list[str]()
        found, rows, report = list[Result](), list(protocol.test), None
        try:
            for name, seed in todo:
                assert base is not None
                try:
                    result = run_method(name, seed, protocol, base, folder, callback.method(name, seed))
                except Exception as error:  # one method's failure is not the others'
                    if not (isinstance(error, RunError) or is_out_of_memory(error)):
                        raise
                    reason = str(error) or "out of memory"
                    failed.append(f"{name}, seed {seed}: {reason}")
                    callback.failed(name, seed, reason)
                    continue
                result.save(folder / RESULTS)
                results[name, seed] = result
                callback.result(result)
        finally:  # an interrupted comparison has a report too
            found = [results[key] for key in every if key in results]
            if out is not None and found:
                with interrupts_deferred():
                    report = write_report(found, rows, folder)
        if failed:
            raise RunError("; ".join([*failed, "the report has the others, and the same command tries these again"]))
    return Comparison(found, rows, report)


def require_ours(folder: Path) -> None:
    """Make sure that a folder is free for a comparison, or holds one.

    Raises:
        InputError: it holds something else.
    """
    ours = {ROWS, PROTOCOL, LOCK, f".{ROWS}.tmp", f".{PROTOCOL}.tmp"}  # by a command that was stopped before a result
    if (folder / PROTOCOL).exists():
        if any((folder / RESULTS).glob("*.json")):
            return
        ours |= {RESULTS, TASKS, PAGE, MARKDOWN, PICTURE}
    if folder.exists() and (
        not folder.is_dir() or any(p.name not in ours and MARK not in p.name for p in folder.iterdir())
    ):
        raise InputError(f"{folder} exists and holds no comparison; give a new folder")


def require_methods(methods: Sequence[str]) -> None:
    """Make sure that methods are some that there are.

    Raises:
        SettingsError: one is none.
    """
    if not methods:
        raise SettingsError(f"no methods to compare; there are {', '.join(METHODS)}")
    unknown = next((name for name in methods if name not in METHODS), None)
    if unknown is not None:
        raise SettingsError(f"no method {unknown!r}{nearest(unknown, METHODS)}; there are {', '.join(METHODS)}")


def _require(model: FrozenModel, methods: Sequence[str], config: TuneConfig | None, plots: bool) -> None:
    """Say now, not after the night, what cannot be compared or what is missing."""
    require_methods(methods)
    if plots:
        require_package("matplotlib", "the report")
    if "lora" in methods:
        require_package("peft", "lora")
    if "full" in methods:
        require_whole(model)
    if any(METHODS[name] in (PrefixTuning, PrefixTuningEnsembles) for name in methods):
        try:
            _ = model.prefix_shape
        except ModelError as error:
            raise SettingsError(f"{error}; leave deep prefixes out of --methods") from error
    trained = [METHODS[name] for name in methods if issubclass(METHODS[name], Trained | Ensembles)]
    if config is not None and config.learning_rate is not None and len({m.changes_weights for m in trained}) > 1:
        raise SettingsError(
            "learning_rate: what is right for a prompt is not for weights; compare them without, or one kind at a time"
        )


def _protocol(
    model: FrozenModel,
    data: Rows,
    eval_data: Rows | None,
    test_data: Rows | None,
    config: TuneConfig,
    equal: Equal,
    search: bool,
) -> Protocol:
    """Split the rows, once for all methods and seeds."""
    if count() > 1:
        raise SettingsError("a comparison runs in one process; start it without torchrun")
    if config.init.startswith(PROMPT):
        raise SettingsError("init: a prompt that was learned before may have seen the test rows; leave it out")
    if config.eval_rows == 0:
        raise SettingsError("a comparison needs validation rows to choose by; leave eval_rows=0 out")
    if test_data is None:
        data, test_data = _held_back(data, None, len(data), config.seed, "--test-data")
    train, validation = _held_back(data, eval_data, config.eval_rows, config.seed, "--eval-data")
    if test_data.task != train.task:
        raise InputError(f"{test_data.name} is for {test_data.task}, {train.name} for {train.task}")
    unknown = set(test_data.labels) - set(train.labels) if train.task == "classification" else None
    if unknown:
        raise InputError(f"{test_data.name} has the label {min(unknown)!r}, which no training row has")
    seen = max(count_duplicates(rows, test_data) for rows in (data, eval_data) if rows is not None)
    if seen:
        warnings.warn(
            f"{seen} of {len(test_data)} test rows ask what another row asks too; on those every method looks better "
            "than it is",
            stacklevel=3,
        )
    train = sample(train, config.train_rows, config.seed)
    if train.task == "text":
        train, validation, test_data = (_predicted(model, config, rows) for rows in (train, validation, test_data))
    minutes = config.max_minutes or MINUTES[config.budget]
    settings = {"max_minutes": minutes, "eval_rows": len(validation), "train_rows": None}
    return Protocol(model, train, validation, test_data, config.model_copy(update=settings), equal, search)


def _held_back(data: Rows, other: Rows | None, most: int, seed: int, option: str) -> tuple[Rows, Rows]:
    """Hold rows back where no other rows are given."""
    try:
        train, held = split_rows(data, other, most, seed)
    except DataError as error:
        if other is not None:
            raise
        raise DataError(f"{data.name}: of its {len(data)} rows too few can be held back; give {option}") from error
    assert held is not None
    return train, held


def _predicted(model: FrozenModel, config: TuneConfig, texts: Rows) -> Rows:
    """Leave out texts of one token: most methods have nothing before it to predict it from."""
    form = make_format("text", [], config.template, None, bool(config.chat_template))
    encoder = Encoder(model.tokenizer, form, config.max_length, model.vocabulary_size)
    examples = (encoder.example(text, texts.where(i)) for i, text in enumerate(texts))
    longer = [i for i, example in enumerate(examples) if example.predicted.targets]
    if not longer:
        raise DataError(f"{texts.name}: no text has a second token, so there is nothing to predict")
    if len(longer) == len(texts):
        return texts
    left_out = len(texts) - len(longer)
    warnings.warn(f"{texts.name}: {left_out} of {len(texts)} texts have one token alone and are left out", stacklevel=4)
    return texts.pick(longer)


def _begin(folder: Path, protocol: Protocol) -> None:
    """Write down what is compared, or make sure that it is what was compared here before.

    Raises:
        InputError: the folder holds another comparison, or something else.
    """
    parts = {"training": protocol.train, "validation": protocol.validation, "test": protocol.test}
    # The budget stands for so much time, which is among the settings, or for so many examples, which is not.
    budget = {"budget"} if protocol.equal == "time" else set[str]()
    record = {
        "rows": {name: rows.sha256 for name, rows in parts.items()},
        "base_model": fingerprint(protocol.model).model_dump(),
        "precision": str(protocol.model.hf_model.dtype),
        "settings": protocol.config.model_dump(exclude=budget),
        "equal": protocol.equal,
        "search": protocol.search,
    }
    file = folder / PROTOCOL
    if not (file.exists() and any((folder / RESULTS).glob("*.json"))):
        require_ours(folder)  # there are no results yet, or no more
        # What does not fit together is said before anything is written, and so is a test row that cannot be read.
        encoder = protocol.prepared().encoder
        protocol.test.require_inputs(encoder.format.columns)
        encoder.examples(protocol.test)
        write_records(folder / ROWS, protocol.test)
        write_text(file, json.dumps(record, indent=1) + "\n")
        return
    before = read_json_object(file, _DAMAGED)
    if not isinstance(before.get("settings"), dict):
        raise InputError(f"{file} is damaged: it holds no settings; {_DAMAGED}")
    usual = TuneConfig().model_dump(exclude=budget)
    for name, value in record.items():
        # What an older version did not write down was then as it usually is.
        then = (
            {**usual, **current_settings(before["settings"], quiet=True)}
            if name == "settings"
            else before.get(name, value)
        )
        if name == "base_model":
            _require_model(folder, then, protocol)
        elif then != json.loads(json.dumps(value)):
            raise InputError(
                f"{folder} holds a comparison with other {name.replace('_', ' ')}; give another folder, or the same "
                "rows, model and settings to go on with it"
            )


def _require_model(folder: Path, noted: object, protocol: Protocol) -> None:
    try:
        before: AnyFingerprint = TypeAdapter(AnyFingerprint).validate_python(noted)
    except ValidationError as error:
        raise InputError(f"{folder / PROTOCOL} does not say which model was compared; give another folder") from error
    differs = difference(before, protocol.model, bool(protocol.config.chat_template))
    if differs:
        raise InputError(
            f"{folder} holds a comparison with another base model: {differs}; give another folder, or the same "
            "model to go on with it"
        )


def _judged(result: Result, protocol: Protocol) -> Result:
    """Return a result of this folder, judged like those that are still to come."""
    if result.ranked_by or protocol.test.task != "completion":
        return result
    config = protocol.config
    form = make_format("completion", [], config.template, None, bool(config.chat_template))
    return judged_anew(result, form, protocol.test)


class Base:
    """The base model before anything was learned."""

    def __init__(self, model: FrozenModel) -> None:
        self.hash = weights_hash(model.hf_model)
        self.perplexity = general_perplexity(model)


def run_method(
    name: str,
    seed: int,
    protocol: Protocol,
    base: Base,
    folder: Path,
    callback: Callback,
    methods: Mapping[str, type[Method]] = METHODS,
) -> Result:
    """Let a method learn, and measure what it gives and takes."""
    gc.collect()  # what the one before held, a copy of the model perhaps, holds itself in cycles
    method = methods[name](protocol, seed, callback)
    try:
        learned = method.learn()
        answering, at_once = learned.answers.model, learned.answers.at_once(protocol.test)
        perplexity = general_perplexity(answering) if method.changes_weights else base.perplexity
        began = time.monotonic()
        side = learned.answers.side(protocol.test, at_once)
        seconds = time.monotonic() - began
        with tempfile.TemporaryDirectory() as scratch:
            place = folder / TASKS / f"{name}-{seed}" if method.keeps else Path(scratch) / "task"
            with storage_errors(place):
                method.store(place)
            stored, switch = folder_bytes(place), _switch_seconds(method, place, protocol.test, at_once)
    finally:
        method.close()
    after = weights_hash(answering.hf_model)  # of LoRA, without its adapter now
    costs = Costs(
        trainable_parameters=learned.parameters,
        stored_bytes=stored,
        train_seconds=learned.effort.seconds,
        train_cpu_seconds=learned.effort.cpu_seconds,
        train_tokens=learned.tokens,
        peak_bytes=learned.effort.peak_bytes,
        prediction_seconds=seconds / len(protocol.test),
        switch_seconds=switch,
        base_unchanged=after == base.hash,
        perplexity_before=base.perplexity,
        perplexity_after=perplexity,
    )
    return _result(name, seed, protocol, learned, side, costs)


def _switch_seconds(method: Method, folder: Path, rows: Rows, at_once: int) -> float:
    """Return how long it takes from the stored files to the first answered row; the base model is there."""
    times = []
    for _ in range(_SWITCHED):
        began = time.monotonic()
        method.load(folder).side(rows.pick([0]), at_once)
        times.append(time.monotonic() - began)
    return float(np.median(times))


def _short(name: str) -> str:
    """Return the name of a file or folder without those around it: a report is shown around."""
    return name if name.startswith("hub:") else Path(name).name


def _result(name: str, seed: int, protocol: Protocol, learned: FitResult, side: ScoredRows, costs: Costs) -> Result:
    parts = {"train": protocol.train, "validation": protocol.validation, "test": protocol.test}
    source = protocol.model.source
    return Result(
        method=name,
        seed=seed,
        task=protocol.test.task,
        data=_short(protocol.train.name),
        base_model=_short(source) if Path(source).is_dir() else source,
        rows={part: len(rows) for part, rows in parts.items()},
        settings={
            **learned.settings,
            "equal": protocol.equal,
            "max_minutes": protocol.config.max_minutes if protocol.equal == "time" else None,
        },
        metrics=side.metrics(),
        confusion=side.scores.confusion(),
        predictions=side.answers(),
        ranked_by=side.completions.ranked_by if side.completions else PRIMARY[protocol.test.task],
        statistics=side.statistics(),
        costs=costs,
        curve=learned.curve,
        environment=environment(),
        date=date.today().isoformat(),
    )
