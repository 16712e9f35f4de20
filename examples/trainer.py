"""Prompt tuning under `transformers.Trainer`, for those who have such a script: only the model's lines are other.

    python examples/trainer.py prompts.csv --column prompt

Where the script says `get_peft_model(model, PromptTuningConfig(...))`, this one says `TrainablePrompt(model, ...)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import softprompt as sp


def main(arguments: list[str] | None = None) -> None:
    """Tune a prompt on plain texts, and show what it changes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a CSV, JSONL or Parquet file of texts")
    parser.add_argument("--column", default="text", help="the column that holds them")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=50, help="how many rows to learn from; the next are held out")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    given = parser.parse_args(arguments)

    model = sp.load_model(given.model)
    rows = sp.load_data(given.data, map={"text": given.column}, task="text")
    train, held_back = rows[: given.rows], rows[given.rows :] or rows

    prompt = sp.TrainablePrompt(model, "I want you to act as a person of this kind:", num_virtual_tokens=8)
    trainer = Trainer(
        model=prompt,
        args=TrainingArguments(
            output_dir=str(given.out),
            use_cpu=True,
            auto_find_batch_size=True,
            learning_rate=3e-2,
            num_train_epochs=given.epochs,
            report_to=[],
        ),
        train_dataset=[model.tokenizer(row["text"], truncation=True, max_length=512) for row in train],
        data_collator=DataCollatorForLanguageModeling(model.tokenizer, mlm=False),
    )
    trainer.train()
    learned = prompt.soft_prompt()
    learned.save(given.out / "prompt")

    done = sp.evaluate(model, held_back, learned)
    assert done.without_prompt is not None
    print(f"loss on {done.rows} rows: {done.without_prompt['loss'].value:.3f} → {done.metrics['loss'].value:.3f}")
    rules = sp.GenerateConfig(max_new_tokens=40, repetition_penalty=1.5)
    for who, one in (("base: ", None), ("tuned:", learned)):
        print(who, sp.generate(model, ["I want you to act as a logistician."], one, rules)[0].replace("\n", " "))


if __name__ == "__main__":
    main()
