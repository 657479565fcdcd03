"""Convert a checkpoint, verify every byte of the artifact, and list the weights with the largest quantization error.

python examples/convert.py SOURCE OUT
"""

import sys

import quantize8


def main(source: str, out: str) -> None:
    """Print the sizes, what was verified, and the three largest relative errors."""
    conversion = quantize8.convert(source, out)
    print(f"{conversion.plan.source_bytes:,} bytes of weights became {conversion.plan.output_bytes:,}")
    verified = quantize8.verify(out)
    print(f"verified {verified.tensors} tensors in {verified.files} files")
    reports = quantize8.inspect(out)
    for report in sorted(reports, key=lambda report: report.relative_error or 0.0, reverse=True)[:3]:
        print(f"{report.relative_error:.4f}  {report.module}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except quantize8.Quantize8Error as error:
        sys.exit(str(error))
