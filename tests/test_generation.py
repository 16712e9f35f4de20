"""Generation behind a precomputed prefix equals transformers' own, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from softprompt.config import GenerateConfig
from softprompt.data.rows import load_data
from softprompt.data.templates import DEFAULT_TEMPLATE
from softprompt.errors import DataError, PromptError, SettingsError
from softprompt.evaluation.evaluate import evaluate
from softprompt.generation import continue_ids, generate
from softprompt.model.backends.base import Backend
from softprompt.model.frozen import MAX_CACHED, FrozenModel
from softprompt.model.prefix import Prefix
from softprompt.prompt.base_model import base_model_record
from softprompt.prompt.record import Record
from softprompt.prompt.soft_prompt import SoftPrompt
from tiny_models import ARCHITECTURES, as_prompt, frozen
from tiny_tokenizers import tiny_tokenizer

TEXTS = ["the parcel never came and", "a fine film", "what", "hello world I want my money back please"]
NEW = 12


def prompt_for(model: FrozenModel, length: int = 9) -> Tensor:
    return torch.randn(length, model.embedding_width, generator=torch.Generator().manual_seed(3)) * 0.2


def soft_prompt(model: FrozenModel, **record: object) -> SoftPrompt:
    return SoftPrompt(prompt_for(model), Record(base_model=base_model_record(model), **record))  # type: ignore[arg-type]


def plain_greedy(
    model: FrozenModel, prompt: Tensor | None, ids: list[int], new: int, penalty: float = 1.0
) -> tuple[str, bool]:
    """Plain greedy decoding: the whole text through the model for every token.

    Returns the new text, and whether it is whole: it ends where the two best logits are too close to compare.
    """
    ids, given = list(ids), len(ids)

    def text() -> str:
        decode = model.tokenizer.decode
        return str(decode(ids, skip_special_tokens=True))[len(decode(ids[:given])) :]

    embed = model.hf_model.get_input_embeddings()
    while len(ids) - given < new:
        parts = [] if prompt is None else [prompt]
        embeds = torch.cat([*parts, embed(torch.tensor(ids, dtype=torch.long))]).unsqueeze(0)
        logits = model.hf_model(inputs_embeds=embeds, use_cache=False).logits[0, -1].float()
        for token in set(ids):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        top = logits.topk(2)
        if float(top.values[0] - top.values[1]) < 1e-3:
            return text().rstrip("\ufffd"), False
        if int(top.indices[0]) == model.tokenizer.eos_token_id:
            break
        ids.append(int(top.indices[0]))
    return text(), True


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_gives_what_each_row_gives_alone_in_plain_transformers(
    architecture: str, with_prompt: bool, penalty: float
) -> None:
    model = frozen(architecture)
    prompt = prompt_for(model) if with_prompt else None
    inputs = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    config = GenerateConfig(repetition_penalty=penalty)
    made = continue_ids(model, as_prompt(prompt), inputs, [NEW, 3, NEW, 7], config)
    compared = 0
    for ids, text, room in zip(inputs, made, [NEW, 3, NEW, 7], strict=True):
        expected, whole = plain_greedy(model, prompt, ids, room, penalty)
        assert text == expected if whole else text.startswith(expected)
        compared += len(expected)
    assert compared > 10


def test_without_a_prompt_it_is_transformers_generate(llama: FrozenModel) -> None:
    ids = llama.tokenizer(TEXTS[0], return_tensors="pt")
    whole = llama.hf_model.generate(**ids, max_length=40, repetition_penalty=1.5, do_sample=False)[0]
    made = generate(llama, [TEXTS[0]], config=GenerateConfig(max_length=40, repetition_penalty=1.5))
    assert TEXTS[0] + made[0] == llama.tokenizer.decode(whole, skip_special_tokens=True)


def test_generate_leaves_text_typed_by_the_user_as_it_is(llama: FrozenModel) -> None:
    config = GenerateConfig(max_new_tokens=1)
    trailing = [llama.tokenizer("I want "), llama.tokenizer("I want")]
    assert trailing[0] != trailing[1]
    one = continue_ids(llama, as_prompt(None), [trailing[0]["input_ids"]], [1], config)
    assert generate(llama, ["I want "], config=config) == one


def test_the_template_is_used_unless_raw(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama, task="completion", template="say {{ input }} again\n")
    config = GenerateConfig(max_new_tokens=8)
    rendered = generate(llama, ["say hello again\n"], prompt, config, raw=True)
    assert generate(llama, ["hello"], prompt, config) == rendered
    assert generate(llama, ["hello"], prompt, config, raw=True) != rendered
    assert generate(llama, ["hello"], prompt, config, virtual_tokens=False) == generate(
        llama, ["say hello again\n"], config=config
    )


LABELS = {"a": "delivery", "b": "good"}


def label_prompt(model: FrozenModel, **record: object) -> SoftPrompt:
    template = DEFAULT_TEMPLATE["classification"]
    return soft_prompt(model, **{"task": "classification", "template": template, "verbalizers": LABELS, **record})


@pytest.mark.parametrize("rules", [{"seed": 1}, {"seed": 0}, {"max_new_tokens": 4}, {"stop": ()}, {"do_sample": False}])
def test_rules_of_writing_are_refused_where_labels_are_chosen_whatever_their_values(
    llama: FrozenModel, rules: dict[str, object]
) -> None:
    prompt, config = label_prompt(llama), GenerateConfig(**rules)  # type: ignore[arg-type]
    for mode in (None, "choose"):
        with pytest.raises(SettingsError, match=rf"{min(rules)}: decoding settings are for writing.*--mode write"):
            generate(llama, ["the parcel"], prompt, config, mode=mode)  # type: ignore[arg-type]
    assert generate(llama, ["the parcel"], prompt, config, mode="write")


def test_a_label_prompt_writes_freely_where_it_is_asked_to(llama: FrozenModel) -> None:
    prompt, config = label_prompt(llama), GenerateConfig(max_new_tokens=12)
    written = generate(llama, ["the parcel"], prompt, config, mode="write")
    assert written == generate(llama, ["the parcel\nLabel:"], prompt, config, raw=True)
    assert written[0] not in (*LABELS, *LABELS.values())


@pytest.mark.parametrize(
    ("kind", "raw", "mode", "message"),
    [
        (None, False, "choose", "only a prompt with labels can"),
        ("completion", False, "choose", "only a prompt with labels can"),
        ("classification", True, "choose", "read raw has no template"),
        ("classification", False, "draw", "mode 'draw' is unknown; allowed are choose and write"),
    ],
)
def test_what_cannot_choose_is_told_so(
    llama: FrozenModel, kind: str | None, raw: bool, mode: str, message: str
) -> None:
    made = {"completion": soft_prompt(llama, task="completion", template="{{ input }}\n")}
    prompt = label_prompt(llama) if kind == "classification" else made.get(str(kind))
    with pytest.raises(SettingsError, match=message):
        generate(llama, ["the parcel"], prompt, mode=mode, raw=raw)  # type: ignore[arg-type]


def test_the_base_chooses_where_the_prompt_does(llama: FrozenModel) -> None:
    prompt = label_prompt(llama, label_bias={"a": 50.0, "b": 0.0})
    texts = [f"the parcel {n}" for n in range(8)]
    rows = load_data([{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)])
    base = [record["prediction"] for record in evaluate(llama, rows, verbalizers=LABELS).predictions]
    assert generate(llama, texts, prompt, virtual_tokens=False) == base
    assert generate(llama, texts, prompt) == ["a"] * 8  # by its own bias, which the base has not


def test_labels_are_chosen_in_batches_of_any_size_alike(llama: FrozenModel) -> None:
    prompt, texts = label_prompt(llama), [f"the parcel {n}" for n in range(7)]
    together = generate(llama, texts, prompt)
    assert generate(llama, texts, prompt, GenerateConfig(batch_size=2)) == together
    assert generate(llama, [], prompt) == generate(llama, [], prompt, mode="write") == []


@pytest.mark.parametrize("seed", [2**45, 2**63 - 1])
def test_a_large_seed_draws_too(llama: FrozenModel, seed: int) -> None:
    config = GenerateConfig(max_new_tokens=3, do_sample=True, seed=seed)
    assert generate(llama, ["hello", "a film"], config=config) == generate(llama, ["hello", "a film"], config=config)


@pytest.mark.parametrize("text", [None, 5, ["a"], b"a"])
def test_what_is_no_text_is_refused_by_its_number(llama: FrozenModel, text: object) -> None:
    for prompt in (None, label_prompt(llama)):
        with pytest.raises(DataError, match=r"text 2 is .*; give a string, or a dictionary"):
            generate(llama, ["a film", text], prompt)  # type: ignore[list-item]


def test_a_label_prompt_answers_as_it_is_evaluated(llama: FrozenModel) -> None:
    prompt = label_prompt(llama)
    rows = load_data([{"text": f"the parcel {n}", "label": "ab"[n % 2]} for n in range(8)])
    expected = [record["prediction"] for record in evaluate(llama, rows, prompt).predictions]
    assert generate(llama, [row["text"] for row in rows], prompt) == expected


def test_texts_are_a_list_and_columns_may_hold_numbers(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama, task="completion", template="{{ input }} {{ price }}")
    given = {"input": "the parcel", "price": 5}
    assert generate(llama, [given], prompt) == generate(llama, [{**given, "price": "5"}], prompt)  # type: ignore[list-item]
    with pytest.raises(SettingsError, match="give a list of texts, not one text"):
        generate(llama, "the parcel", prompt)


def test_as_many_new_tokens_as_fit_do_not_cut_the_text(llama: FrozenModel, recwarn: pytest.WarningsRecorder) -> None:
    prompt = soft_prompt(llama, task="completion", template="{{ input }}\n", max_length=247)
    generate(llama, ["the parcel never came"], prompt, GenerateConfig(max_new_tokens=5000))
    assert not [w for w in recwarn if "cut" in str(w.message)]


def test_max_length_counts_real_tokens_only(llama: FrozenModel) -> None:
    ids = llama.tokenizer("the parcel")["input_ids"]
    prompt = soft_prompt(llama)
    at_ten = generate(llama, ["the parcel"], prompt, GenerateConfig(max_length=10))
    assert at_ten == generate(llama, ["the parcel"], prompt, GenerateConfig(max_new_tokens=10 - len(ids)))


def test_a_prompt_alone_can_be_continued_and_nothing_cannot(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama)
    expected, _ = plain_greedy(llama, prompt.weights, [], 6)
    made = generate(llama, ["", "a fine film"], prompt, GenerateConfig(max_new_tokens=6))
    assert expected and made[0].startswith(expected)
    with pytest.raises(SettingsError, match="empty"):
        generate(llama, [""])


def test_sampling_depends_on_the_seed_and_not_on_the_batch(llama: FrozenModel) -> None:
    rules = {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95, "max_new_tokens": 10}
    one = generate(llama, TEXTS, config=GenerateConfig(**rules, seed=1))
    assert one == generate(llama, TEXTS, config=GenerateConfig(**rules, seed=1))
    assert one != generate(llama, TEXTS, config=GenerateConfig(**rules, seed=2))
    assert one[:2] == generate(llama, TEXTS[:2], config=GenerateConfig(**rules, seed=1))


def test_sampling_from_one_candidate_is_greedy(llama: FrozenModel) -> None:
    config = GenerateConfig(max_new_tokens=8)
    drawn = GenerateConfig(max_new_tokens=8, do_sample=True, top_k=1)
    assert generate(llama, TEXTS, config=config) == generate(llama, TEXTS, config=drawn)


def test_more_rows_than_are_run_at_once_keep_their_order(llama: FrozenModel) -> None:
    config = GenerateConfig(max_new_tokens=4)
    many = [f"{text} {i}" for i in range(10) for text in TEXTS]
    assert generate(llama, many, config=config) == [generate(llama, [text], config=config)[0] for text in many]


def test_an_end_of_text_token_ends_a_row_and_is_not_shown(llama: FrozenModel) -> None:
    free = generate(llama, ["hello"], config=GenerateConfig(max_new_tokens=6))[0]
    ids = llama.tokenizer("hello", return_tensors="pt")
    whole = llama.hf_model.generate(**ids, max_new_tokens=6, do_sample=False)[0].tolist()
    second = whole[ids["input_ids"].shape[1] + 1]
    assert second not in whole[: ids["input_ids"].shape[1] + 1]
    settings = llama.hf_model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = [before, second]
    try:
        stopped = generate(llama, ["hello"], config=GenerateConfig(max_new_tokens=6))[0]
    finally:
        settings.eos_token_id = before
    assert free.startswith(stopped)
    assert len(stopped) < len(free)


def test_a_prompt_for_another_model_is_refused(llama: FrozenModel) -> None:
    other = frozen("mistral")
    with pytest.raises(PromptError, match="another model"):
        generate(other, ["hello"], soft_prompt(llama))


def test_a_template_of_several_columns_takes_dictionaries(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama, task="completion", template="{{ input }} and {{ text }}\n")
    config = GenerateConfig(max_new_tokens=3)
    assert generate(llama, [{"input": "a", "text": "b"}], prompt, config) == generate(
        llama, ["a and b\n"], prompt, config, raw=True
    )
    with pytest.raises(SettingsError, match="columns input, text"):
        generate(llama, ["a"], prompt, config)


def test_no_room_for_new_tokens_is_an_error(llama: FrozenModel) -> None:
    ids = tiny_tokenizer()("the parcel never came")["input_ids"]
    with pytest.raises(SettingsError, match=f"own {len(ids)} tokens"):
        generate(llama, ["the parcel never came"], config=GenerateConfig(max_length=len(ids)))


def test_threads_share_a_model(llama: FrozenModel) -> None:
    config = GenerateConfig(max_new_tokens=8)
    prompt = soft_prompt(llama)
    expected = {
        (text, soft): generate(llama, [text], prompt if soft else None, config)
        for text in TEXTS
        for soft in (True, False)
    }
    jobs = [*expected] * 6
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda job: generate(llama, [job[0]], prompt if job[1] else None, config), jobs))
    assert made == [expected[job] for job in jobs]
    assert llama.hf_model.config._attn_implementation != "softprompt_packed"


def test_a_plain_text_prompts_own_template_is_used(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama, task="text", template="say {{ text }} again")
    config = GenerateConfig(max_new_tokens=8)
    assert generate(llama, ["hello"], prompt, config) == generate(llama, ["say hello again"], prompt, config, raw=True)


def test_a_long_input_is_cut_so_that_new_tokens_fit(llama: FrozenModel) -> None:
    prompt = soft_prompt(llama, task="completion", template="{{ input }}\n", max_length=247)
    with pytest.warns(UserWarning, match="1 of 1 texts were cut to"):
        generate(llama, ["the parcel never came and " * 100], prompt)
    assert len(generate(llama, ["the parcel never came and " * 100], prompt, GenerateConfig(max_new_tokens=5))[0]) > 0


def test_prefix_of_a_prompt_is_computed_once_and_the_last_few_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("llama")
    runs: list[int] = []
    right = type(model.backend).prompt_pass

    def counted(self: Backend, embeddings: Tensor) -> Prefix:
        runs.append(embeddings.shape[1])
        return right(self, embeddings)

    monkeypatch.setattr(type(model.backend), "prompt_pass", counted)
    prompts = [prompt_of(model, seed) for seed in range(MAX_CACHED + 1)]
    first = generate(model, ["a fine film", "hello"], prompts[0])
    assert generate(model, ["a fine film", "hello"], prompts[0]) == first
    assert runs == [5]
    for prompt in prompts:
        generate(model, ["hello"], prompt)
    assert len(runs) == MAX_CACHED + 1
    assert generate(model, ["a fine film", "hello"], prompts[0]) == first
    assert len(runs) == MAX_CACHED + 2


def prompt_of(model: FrozenModel, seed: int) -> SoftPrompt:
    embeddings = torch.randn(5, model.embedding_width, generator=torch.Generator().manual_seed(seed)) * 0.3
    return SoftPrompt(embeddings, Record(base_model=base_model_record(model)))
