"""The tutorial that softprompt grew out of: prompt tuning on awesome-chatgpt-prompts, base output against tuned output.

    python examples/tutorial.py prompts.csv                                     # the bundled model
    python examples/tutorial.py prompts.csv --model bigscience/bloomz-560m      # as in the tutorial

`prompts.csv` is the file of that name in https://github.com/f/awesome-chatgpt-prompts (CC0), columns `act`, `prompt`.
"""

from __future__ import annotations

import argparse

import softprompt as sp

TEXT = "I want you to act as a logistician. "


def main() -> None:
    """Run the tutorial with its own settings, then with softprompt's defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prompts.csv")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, help="for a quick look: so many steps instead of all")
    options = parser.parse_args()

    # 1. Model and tokenizer, on the CPU.
    model = sp.load_model(options.model, device="cpu", say=print)

    # 2. The base model's output. Text is read as it was typed, the space at its end included.
    rules = sp.GenerateConfig(max_length=100, repetition_penalty=1.5)
    print("\nbase model:\n" + TEXT + sp.generate(model, [TEXT], config=rules)[0])

    # 3. The first 50 prompts to learn from; the others tell how well that went.
    train = sp.load_data(f"{options.data}[:50]", map={"text": "prompt"})
    other = sp.load_data(f"{options.data}[50:]", map={"text": "prompt"})

    # 4. Prompt tuning: 4 virtual tokens from random values, learning rate 0.005, 5 epochs, loss over all text tokens.
    tutorial = sp.TuneConfig(
        init="random",
        num_virtual_tokens=4,
        learning_rate=0.005,
        epochs=5,
        max_steps=options.steps,
        batch_size=8,
        warmup_ratio=0,
        schedule="linear",
        eval_rows=0,  # all 50 rows are learned from, and the last prompt is kept
    )
    for name, config in (
        ("the tutorial's", tutorial),
        ("softprompt's default", sp.TuneConfig(max_steps=options.steps)),
    ):
        result = sp.tune(model, train, config)

        # 5. The same text under the same rules, and the loss on rows that played no part.
        print(f"\ntuned with {name} settings, {result.steps} steps in {result.seconds:.0f} s:")
        print(TEXT + sp.generate(model, [TEXT], prompt=result.prompt, config=rules)[0])
        done = sp.evaluate(model, other, prompt=result.prompt)
        assert done.without_prompt is not None
        before, after = done.without_prompt["loss"], done.metrics["loss"]
        print(f"loss on {done.rows} other rows: {before.value:.3f} without the prompt, {after.value:.3f} with it")


if __name__ == "__main__":
    main()
