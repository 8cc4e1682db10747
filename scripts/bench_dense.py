"""The dense models that other benchmarks take with `--model`, made from packages alone."""

from pathlib import Path

import click
import torch
from arguments import Arguments
from job import Job
from packaged import (
    GPT_FILE,
    packaged_gpt,
    packaged_model,
    reuters_r8,
    rotten_tomatoes,
    strip_quantizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_prune.recipe import Recipe, Train

EPOCHS = {"rotten-tomatoes": 1.0, "reuters-r8": 2.0}
"""Of the fine-tuning: on 6,000 texts of Rotten Tomatoes, as `make demo` does, or on all of R8."""
TOKENS = {"rotten-tomatoes": 128, "reuters-r8": 96}
"""Of each text, at most."""

_out = click.argument("out", type=click.Path(path_type=Path, file_okay=False))


@click.command()
@_out
@click.option("--data", type=click.Choice(sorted(EPOCHS)), required=True)
def classifier(out: Path, data: str) -> None:
    """Fine-tune MiniLM-L6; print its accuracy and write it."""
    first = Train(num_train_epochs=EPOCHS[data], learning_rate=1e-4, warmup_steps=20)
    arguments = Arguments(max_length=TOKENS[data])
    rows = rotten_tomatoes() if data == "rotten-tomatoes" else reuters_r8()
    set_seed(0)  # the head is drawn while the model is loaded
    job = Job(arguments, Recipe(seed=0, stages=(first,)), packaged_model(), rows)
    job.train(first, (), 0)
    print(f"{data}: {job.score(job.model):.4f} of {len(job.data['test'])} right")
    job.model.save_pretrained(out)
    job.tokenizer.save_pretrained(out)


@click.command()
@_out
def decoder(out: Path) -> None:
    """Write SmolLM2-135M from its GGUF file as an ordinary folder in float32."""
    told = {"gguf_file": GPT_FILE}
    model = AutoModelForCausalLM.from_pretrained(packaged_gpt(), dtype=torch.float32, **told)
    strip_quantizer(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(packaged_gpt(), **told).save_pretrained(out)
