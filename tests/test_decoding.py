"""Beams, stop strings and batches."""

from __future__ import annotations

import pytest
import torch

from softprompt.config import GenerateConfig, read_settings
from softprompt.decoding import continue_ids
from softprompt.errors import SettingsError
from softprompt.model.frozen import FrozenModel
from tiny_models import ARCHITECTURES, as_prompt, frozen

TEXTS = ["what a fine film", "the parcel", "I want my money back please", "a"]
ROOM = 12


def encoded(model: FrozenModel) -> list[list[int]]:
    return [model.tokenizer(text)["input_ids"] for text in TEXTS]


def virtual(model: FrozenModel, count: int = 5) -> torch.Tensor:
    return model.embed(range(50, 50 + count)).float()


def by_transformers(model: FrozenModel, prompt: torch.Tensor, ids: list[int], **rules: object) -> str:
    """transformers' own beam search, which is given the embeddings of prompt and text."""
    rows = torch.cat([prompt, model.embed(ids) if ids else prompt[:0]]).unsqueeze(0)
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    made = model.hf_model.generate(
        inputs_embeds=rows, attention_mask=mask, max_new_tokens=ROOM, do_sample=False, pad_token_id=0, **rules
    )[0]
    return str(model.tokenizer.decode([*ids, *made.tolist()], skip_special_tokens=True)).removeprefix(
        str(model.tokenizer.decode(ids, skip_special_tokens=True))
    )


@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (4, 0.0), (4, 2.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beam_search_finds_what_transformers_finds(architecture: str, beams: int, length_penalty: float) -> None:
    model = frozen(architecture)
    # An end that is likely, so that beams of unlike lengths compete.
    lm_head = model.hf_model.get_output_embeddings()
    lm_head.weight.data[2] = lm_head.weight.data[100:104].mean(dim=0) * 3
    prompt, inputs = virtual(model), encoded(model)
    config = GenerateConfig(num_beams=beams, length_penalty=length_penalty)
    ours = continue_ids(model, as_prompt(prompt), inputs, [ROOM] * len(inputs), config)
    rules = {"num_beams": beams, "length_penalty": length_penalty, "early_stopping": False}
    assert ours == [by_transformers(model, prompt, ids, **rules) for ids in inputs]


def test_one_beam_is_the_greedy_path_and_more_find_likelier_texts(llama: FrozenModel) -> None:
    inputs, prompt = encoded(llama), virtual(llama)

    def log_probability(config: GenerateConfig) -> float:
        total = 0.0
        for ids, new in zip(inputs, continue_ids(llama, as_prompt(prompt), inputs, [6] * 4, config), strict=True):
            more = llama.tokenizer(new, add_special_tokens=False)["input_ids"]
            row = torch.cat([prompt, llama.embed([*ids, *more])]).unsqueeze(0)
            logs = llama.hf_model(inputs_embeds=row).logits[0].log_softmax(dim=-1)
            total += sum(float(logs[5 + len(ids) - 1 + k, token]) for k, token in enumerate(more))
        return total

    assert log_probability(GenerateConfig(num_beams=8)) > log_probability(GenerateConfig())


def test_the_repetition_penalty_sees_the_real_tokens_in_beam_search(llama: FrozenModel) -> None:
    ids = encoded(llama)[0]
    rules = {"num_beams": 3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    ours = continue_ids(llama, as_prompt(None), [ids], [ROOM], GenerateConfig(**rules))
    made = llama.hf_model.generate(
        torch.tensor([ids]), max_new_tokens=ROOM, do_sample=False, pad_token_id=0, early_stopping=False, **rules
    )[0]
    assert ours == [llama.tokenizer.decode(made)[len(llama.tokenizer.decode(ids)) :]]


def test_an_empty_text_is_searched_from_the_prompt_itself(llama: FrozenModel) -> None:
    prompt = virtual(llama)
    (ours,) = continue_ids(llama, as_prompt(prompt), [[]], [ROOM], GenerateConfig(num_beams=3))
    assert ours == by_transformers(llama, prompt, [], num_beams=3, early_stopping=False)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_a_stop_string_ends_a_text_and_is_cut_off(architecture: str, beams: int) -> None:
    model = frozen(architecture)
    inputs, room = encoded(model), [ROOM] * len(TEXTS)
    whole = continue_ids(model, as_prompt(virtual(model)), inputs, room, GenerateConfig())
    stops = [text[4:7] for text in whole]  # wherever these lie: inside of a token, or over a border
    for stop, text in zip(stops, whole, strict=True):
        ended = continue_ids(model, as_prompt(virtual(model)), inputs, room, GenerateConfig(stop=stop))
        assert ended == [other.split(stop)[0] for other in whole]
        assert text[4:7] == stop
    searched = continue_ids(model, as_prompt(virtual(model)), inputs, room, GenerateConfig(stop=stops, num_beams=beams))
    assert not any(stop in text for stop in stops for text in searched)


def test_a_stop_string_in_the_given_text_does_not_count(llama: FrozenModel) -> None:
    inputs, room = encoded(llama), [ROOM] * len(TEXTS)
    whole = continue_ids(llama, as_prompt(virtual(llama)), inputs, room, GenerateConfig())
    assert not any("fine film" in text for text in whole)
    assert continue_ids(llama, as_prompt(virtual(llama)), inputs, room, GenerateConfig(stop="fine film")) == whole


def test_a_text_stops_as_soon_as_it_can(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = encoded(llama)[:1]
    (whole,) = continue_ids(llama, as_prompt(virtual(llama)), ids, [ROOM], GenerateConfig())
    passes = []
    plain = type(llama.hf_model).forward

    def counted(*args: object, **kwargs: object) -> object:
        passes.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(type(llama.hf_model), "forward", counted)
    continue_ids(llama, as_prompt(virtual(llama)), ids, [ROOM], GenerateConfig())
    long, passes[:] = len(passes), []
    continue_ids(llama, as_prompt(virtual(llama)), ids, [ROOM], GenerateConfig(stop=whole[:1]))
    assert len(passes) < long - ROOM // 2


@pytest.mark.parametrize("rules", [{}, {"do_sample": True}, {"stop": "a"}], ids=["greedy", "drawn", "stopped"])
def test_the_batch_size_changes_nothing(llama: FrozenModel, rules: dict[str, object]) -> None:
    inputs, room = encoded(llama), [ROOM, 3, ROOM, 7]
    made = [
        continue_ids(llama, as_prompt(virtual(llama)), inputs, room, GenerateConfig(batch_size=size, **rules))
        for size in (1, 3, 16)
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("text", "stop"), [("END", ("END",)), (r"\n", ("\n",)), ('["\\n", "END"]', ("\n", "END")), ("[x", None), ("", None)]
)
def test_stop_strings_on_the_command_line(text: str, stop: tuple[str, ...] | None) -> None:
    if stop is None:
        with pytest.raises(SettingsError, match="stop"):
            read_settings(GenerateConfig, assignments=[f"stop={text}"])
    else:
        assert read_settings(GenerateConfig, assignments=[f"stop={text}"])[0].stop == stop


def test_beams_are_refused_with_sampling() -> None:
    with pytest.raises(SettingsError, match="leave num_beams or do_sample out"):
        read_settings(GenerateConfig, assignments=["num_beams=2", "do_sample=true"])
