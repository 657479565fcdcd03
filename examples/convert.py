"""Convert a checkpoint, check every byte of the artifact, and name the weights that int8 changes most.

python examples/convert.py SOURCE OUT
"""

import sys

import quantize8


def main(source: str, out: str) -> None:
    """Print sizes, what was verified, and the three largest relative errors."""
    done = quantize8.convert(source, out)
    print(f"{done.plan.source_bytes:,} bytes of weights became {done.plan.output_bytes:,}")
    found = quantize8.verify(out)
    print(f"verified {found.tensors} tensors in {found.files} files")
    reports = quantize8.inspect(out)
    for report in sorted(reports, key=lambda report: report.relative_error or 0.0, reverse=True)[:3]:
        print(f"{report.relative_error:.4f}  {report.module}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except quantize8.Quantize8Error as error:
        sys.exit(str(error))
