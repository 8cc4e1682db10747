"""Figures that are not tests, one sub-command for each subject; each writes JSON.

python scripts/benchmark.py step runs/benchmark_step.json
python scripts/benchmark.py loading runs/loading.json
python scripts/benchmark.py structured-text runs/structured_text.json --model DIR --data NAME
python scripts/benchmark.py structured-lm runs/structured_lm.json --model DIR --text DIR
python scripts/benchmark.py structured-latency runs/structured_latency.json --model DIR
python scripts/benchmark.py structured-cost runs/structured_cost.json --model DIR
python scripts/benchmark.py training-methods runs/training_methods.json
python scripts/benchmark.py training-students runs/training_students.json
python scripts/benchmark.py weights-lm runs/benchmark_weights_lm.json --model DIR --text DIR
python scripts/benchmark.py weights-text runs/weights_text.json --model DIR --data NAME
python scripts/benchmark.py weights-layers runs/weights_layers.json --model DIR --text DIR
python scripts/benchmark.py weights-memory runs/weights_memory.json
python scripts/benchmark.py weights-digits runs/weights_digits.json
"""

import bench_loading
import bench_step
import bench_structured
import bench_training
import bench_weights
import bench_weights_cost
import bench_weights_text
import click


@click.group(help=__doc__)
def main() -> None:
    """Nothing of its own: the sub-commands do the work."""


main.add_command(bench_loading.command, "loading")
main.add_command(bench_step.command, "step")
main.add_command(bench_structured.text, "structured-text")
main.add_command(bench_structured.language_model, "structured-lm")
main.add_command(bench_structured.latency, "structured-latency")
main.add_command(bench_structured.cost, "structured-cost")
main.add_command(bench_training.methods, "training-methods")
main.add_command(bench_training.students, "training-students")
main.add_command(bench_weights.language_model, "weights-lm")
main.add_command(bench_weights_text.text, "weights-text")
main.add_command(bench_weights_text.digits, "weights-digits")
main.add_command(bench_weights_cost.layers, "weights-layers")
main.add_command(bench_weights_cost.memory, "weights-memory")

if __name__ == "__main__":
    main()
