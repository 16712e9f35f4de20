"""Models whose rows cannot share a cache: found when they are loaded, and decoded as each text is alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from softprompt.config import GenerateConfig
from softprompt.decoding import continue_ids
from softprompt.errors import ModelError
from softprompt.model.backends import prefix_batch
from softprompt.model.backends.cache import cached_tensors
from softprompt.model.backends.decode import SharedCacheBatch
from softprompt.model.backends.differences import decoding_differences
from softprompt.model.backends.packed import PackedBackend
from softprompt.model.backends.reference import Reference
from softprompt.model.backends.verify import freeze
from softprompt.model.frozen import FrozenModel
from tiny_models import as_prompt
from tiny_runs import Command
from tiny_tokenizers import tiny_tokenizer

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
DECODER = {"vocab_size": 400, "max_position_embeddings": 256, "is_encoder_decoder": False, **SIZES, **IDS}
GROUPS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "kv_channels": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LAYERS = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **IDS}

# The decoders of encoder-decoder models number their positions from the length of the cache, padding included; JetMoe
# and DeepSeek keep something else in the cache than what their attention sees.
MODELS: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "bart": ("BartForCausalLM", lambda: transformers.BartConfig(**DECODER)),
    "mbart": ("MBartForCausalLM", lambda: transformers.MBartConfig(**DECODER)),
    "mvp": ("MvpForCausalLM", lambda: transformers.MvpConfig(**DECODER)),
    "plbart": ("PLBartForCausalLM", lambda: transformers.PLBartConfig(**DECODER)),
    "pegasus": ("PegasusForCausalLM", lambda: transformers.PegasusConfig(**DECODER)),
    "bigbird-pegasus": ("BigBirdPegasusForCausalLM", lambda: transformers.BigBirdPegasusConfig(**DECODER)),
    "blenderbot": ("BlenderbotForCausalLM", lambda: transformers.BlenderbotConfig(**DECODER)),
    "blenderbot-small": ("BlenderbotSmallForCausalLM", lambda: transformers.BlenderbotSmallConfig(**DECODER)),
    "marian": ("MarianForCausalLM", lambda: transformers.MarianConfig(**DECODER, decoder_start_token_id=0)),
    "trocr": ("TrOCRForCausalLM", lambda: transformers.TrOCRConfig(**DECODER)),
    "whisper": ("WhisperForCausalLM", lambda: transformers.WhisperConfig(**DECODER, max_target_positions=256)),
    "jetmoe": ("JetMoeForCausalLM", lambda: transformers.JetMoeConfig(**LAYERS, **GROUPS)),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(**LAYERS, **LATENT, num_attention_heads=4, num_key_value_heads=4),
    ),
}
TEXTS = ["what a fine film I want my money back please", "good", "the parcel"]
ROOM = 10


def tiny(name: str) -> PreTrainedModel:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, kind)(config())
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval()


@functools.cache
def checked(name: str) -> FrozenModel:
    return freeze(tiny(name), tiny_tokenizer(), name)


def plainly(model: FrozenModel, prompt: torch.Tensor | None, ids: list[int]) -> str:
    """Decode greedily with the whole row through the base model for every token."""
    virtual = model.embed(ids)[:0] if prompt is None else prompt
    made = list(ids)
    while len(made) < len(ids) + ROOM:
        row = torch.cat([virtual, model.embed(made)]).unsqueeze(0)
        token = int(model.hf_model(inputs_embeds=row, use_cache=False).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        made.append(token)
    whole, given = (model.tokenizer.decode(each, skip_special_tokens=True) for each in (made, ids))
    return str(whole)[len(str(given)) :]


@pytest.mark.parametrize("prompted", [False, True], ids=["none", "prompt"])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_in_a_batch_is_continued_as_it_is_alone(name: str, prompted: bool) -> None:
    model = checked(name)
    prompt = model.embed(range(50, 55)).float() if prompted else None
    inputs = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    expected = [plainly(model, prompt, ids) for ids in inputs]
    for size in (1, 16):
        assert continue_ids(model, as_prompt(prompt), inputs, [ROOM] * 3, GenerateConfig(batch_size=size)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_beams_and_ensembles_of_prompts_are_those_of_texts_alone(name: str) -> None:
    model = checked(name)
    prompts = [model.embed(range(50, 55)).float(), model.embed(range(60, 63)).float()]
    inputs = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    for rules in ({"num_beams": 3}, {"do_sample": True}, {}):
        together = continue_ids(model, as_prompt(*prompts), inputs, [ROOM] * 3, GenerateConfig(**rules))
        config = GenerateConfig(batch_size=1, **rules)
        if "do_sample" in rules:  # each text has a random state of its own, by its place
            assert together == continue_ids(model, as_prompt(*prompts), inputs, [ROOM] * 3, config)
        else:
            assert together == [continue_ids(model, as_prompt(*prompts), [ids], [ROOM], config)[0] for ids in inputs]


@pytest.mark.parametrize("name", MODELS)
def test_the_check_sees_that_the_cache_cannot_be_shared(name: str) -> None:
    model = checked(name)
    assert not model.backend.shares_cache
    own_prefixes, shared_cache = decoding_differences(Reference(model.hf_model), model)
    assert own_prefixes < 1e-5
    assert shared_cache > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bart", "whisper", "jetmoe"])
def test_so_it_does_in_half_precision(name: str, dtype: torch.dtype) -> None:
    assert not freeze(tiny(name).to(dtype), tiny_tokenizer(), name).backend.shares_cache


@pytest.mark.parametrize("name", ["bart", "jetmoe"])
def test_generate_gives_the_same_with_and_without_batches(name: str, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / name
    tiny(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    asked = ["generate", "none", *TEXTS[:2], "--model", folder, "--json", "--set", "max_new_tokens=8"]
    together = command(*asked)
    assert together.code == 0, together.err
    assert together.record["outputs"] == command(*asked, "--set", "batch_size=1").record["outputs"]


@pytest.mark.parametrize("broken", ["position", "mask"])
def test_a_cache_that_is_used_wrongly_is_found_out(
    broken: str, llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SharedCacheBatch.step

    def wrong(self: SharedCacheBatch, tokens: list[int]) -> torch.Tensor:
        if broken == "position":
            self._lengths = self._lengths + (self._lengths != self._lengths.max())  # of the shorter rows
        else:
            self._mask = torch.ones_like(self._mask)  # padding is seen
        return step(self, tokens)

    monkeypatch.setattr(SharedCacheBatch, "step", wrong)
    model = freeze(llama.hf_model, llama.tokenizer)
    assert (model.backend.name, model.backend.shares_cache) == ("packed", False)


def test_rows_that_are_read_wrongly_refuse_a_model(llama: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Padding behind a shorter prefix, where its text should follow: nothing but unlike prefixes shows it.
    monkeypatch.setattr(
        prefix_batch, "pad", lambda tensor, sides: torch.nn.functional.pad(tensor, (0, 0, sides[3], sides[2]))
    )
    monkeypatch.setattr("softprompt.model.backends.verify.BACKENDS", (PackedBackend,))
    with pytest.raises(ModelError, match=r"packed: texts of unlike lengths in one batch: logits differ by \d"):
        freeze(llama.hf_model, llama.tokenizer)


def test_a_cache_is_shared_where_it_can_be(llama: FrozenModel) -> None:
    assert llama.backend.shares_cache
    prefix = llama.prefix(llama.embed([5, 6, 7]))
    cache = llama.backend.decode([prefix, prefix])
    assert isinstance(cache, SharedCacheBatch)
    keys, _ = cached_tensors(cache._cache)
    assert keys[0].shape[0] == 2
