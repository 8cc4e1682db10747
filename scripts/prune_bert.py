"""Fine-tune, prune, recover, measure and save a BERT-style model, as a recipe says.

    accelerate launch scripts/prune_bert.py    # packaged model and data, offline
    accelerate launch scripts/prune_bert.py --model_name_or_path me/bert-sst2 \
        --dataset_name stanfordnlp/sst2 --text_column sentence --eval_split validation
    accelerate launch scripts/prune_bert.py --task token-classification \
        --train_file train.conll --eval_file test.conll
    accelerate launch scripts/prune_bert.py --task question-answering \
        --dataset_name rajpurkar/squad --eval_split validation --max_length 384

In the output folder: model/ (loads with plain from_pretrained after `import hf_prune`), plan.json,
recipe.yaml, report.json, README.md (the model card) and units.svg.
"""

from dataclasses import dataclass, field

from arguments import Arguments
from datasets import DatasetDict
from launch import RECIPES, Packaged, launch
from packaged import DATASET_NAME, MODEL_NAME, packaged_model, rotten_tomatoes


@dataclass
class BertArguments(Arguments):
    """The same, with the defaults of this script."""

    recipe: str = field(
        default=str(RECIPES / "bert" / "speedup-2x.yaml"),
        metadata={"help": "YAML file with the stages."},
    )
    output_dir: str = field(default="runs/prune_bert", metadata={"help": "Where results go."})


def packaged_data(task: str, seed: int) -> DatasetDict | None:
    """Rotten Tomatoes, for classification of texts; nothing is packaged for other tasks."""
    return rotten_tomatoes(seed) if task == "text-classification" else None


NAMES = {
    "model": MODEL_NAME,
    "data": DATASET_NAME,
    "split": "movies that training never saw",
    "license": "apache-2.0",
}

if __name__ == "__main__":
    launch("prune_bert.py", BertArguments, Packaged(packaged_model, packaged_data, NAMES))
