"""Prune, recover, measure and save a causal language model, as a recipe says.

    accelerate launch scripts/prune_gpt.py --train_file train.txt --eval_file test.txt
    accelerate launch scripts/prune_gpt.py --model_name_or_path openai-community/gpt2 \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1

The packaged model is SmolLM2-135M. Text is cut into blocks of `--max_length` tokens, and measured
by its perplexity. The output folder is that of prune_bert.py.
"""

from dataclasses import dataclass, field

from arguments import Arguments
from datasets import DatasetDict
from launch import RECIPES, Packaged, launch
from packaged import GPT_FILE, GPT_NAME, packaged_gpt


@dataclass
class GptArguments(Arguments):
    """The same, with the defaults of this script."""

    recipe: str = field(
        default=str(RECIPES / "llama" / "structured-25.yaml"),
        metadata={"help": "YAML file with the stages."},
    )
    task: str = field(default="text-generation", metadata={"help": "Of this script."})
    output_dir: str = field(default="runs/prune_gpt", metadata={"help": "Where results go."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a block."})
    max_train_samples: int | None = field(
        default=256, metadata={"help": "Random part of the blocks; 0 = all of them."}
    )
    eval_batch_size: int = field(default=4, metadata={"help": "Blocks at once, measuring."})
    latency_batch_size: int = field(default=4, metadata={"help": "Sequences at once, timing."})
    latency_rounds: int = field(default=5, metadata={"help": "Rounds over all models."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            self.gguf_file = GPT_FILE


def packaged_data(task: str, seed: int) -> DatasetDict | None:
    """Nothing is packaged: text is named with --train_file and --eval_file, or --dataset_name."""
    return None


NAMES = {"model": GPT_NAME, "data": "", "split": "", "license": "apache-2.0"}

if __name__ == "__main__":
    launch("prune_gpt.py", GptArguments, Packaged(packaged_gpt, packaged_data, NAMES))
