"""Figures that are not tests, one sub-command for each subject; each writes JSON.

python scripts/benchmark.py step runs/benchmark_step.json
python scripts/benchmark.py structured-text runs/structured_text.json --model DIR --data NAME
python scripts/benchmark.py structured-lm runs/structured_lm.json --model DIR --text DIR
python scripts/benchmark.py structured-latency runs/structured_latency.json --model DIR
python scripts/benchmark.py structured-cost runs/structured_cost.json --model DIR
python scripts/benchmark.py weights-lm runs/benchmark_weights_lm.json --model DIR --text DIR
python scripts/benchmark.py weights-text runs/benchmark_weights_text.json --model DIR
python scripts/benchmark.py weights-layers runs/benchmark_weights_layers.json --model DIR
python scripts/benchmark.py weights-digits runs/benchmark_weights_digits.json
"""

import bench_step
import bench_structured
import bench_weights
import click


@click.group(help=__doc__)
def main() -> None:
    """Nothing of its own: the sub-commands do the work."""


main.add_command(bench_step.command, "step")
main.add_command(bench_structured.text, "structured-text")
main.add_command(bench_structured.language_model, "structured-lm")
main.add_command(bench_structured.latency, "structured-latency")
main.add_command(bench_structured.cost, "structured-cost")
main.add_command(bench_weights.language_model, "weights-lm")

if __name__ == "__main__":
    main()
