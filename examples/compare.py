"""Compare an artifact with the checkpoint that it was made from, on a text.

python examples/compare.py ARTIFACT SOURCE [TEXT]
"""

import sys

import quantize8


def main(artifact: str, source: str, text: str | None = None) -> None:
    """Print both perplexities, the KL divergence, and the top-1 agreement."""
    result = quantize8.evaluate(artifact, text=text, reference=source, tokens=512, context=128)
    agreement = result.agreement
    assert agreement is not None  # a reference was given
    print(f"perplexity     {agreement.perplexity.value:.3f} (source), {result.perplexity.value:.3f} (int8)")
    print(f"KL divergence  {agreement.kl.mean:.5f} nats per token")
    print(f"top-1          {agreement.top1:.1%} of {result.scored} tokens")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except quantize8.Quantize8Error as error:
        sys.exit(str(error))
