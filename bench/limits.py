"""The machine's limits as one JSON line, measured in a process of their own: `python -m bench.limits --threads 2`."""

import argparse
import json

from headrace.bench.limits import measure_limits
from headrace.config import WeightFormat
from headrace.kernels import kernel_choice_from, resolve_kernels
from headrace.models.loading import WeightFormats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    kernels = resolve_kernels(kernel_choice_from())
    kernels.set_num_threads(args.threads)
    formats = WeightFormats(dense=WeightFormat.BFLOAT16, linear=WeightFormat.INT8)
    limits = measure_limits(kernels, formats, args.threads, lambda _: None)
    print(json.dumps({"read_gb_per_s": limits.read_gb_per_s, "multiply_gops": limits.multiply_gops}))


if __name__ == "__main__":
    main()
