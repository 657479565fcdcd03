"""Score an artifact against the checkpoint that it was made of, on a text.

python examples/compare.py ARTIFACT SOURCE [TEXT]
"""

import sys

import quantize8


def main(artifact: str, source: str, text: str | None = None) -> None:
    """Print both perplexities, the KL divergence, and how often both find the same token the likeliest."""
    found = quantize8.evaluate(artifact, text=text, reference=source, tokens=512, context=128)
    agreement = found.agreement
    assert agreement is not None  # a reference was given
    print(f"perplexity     {agreement.perplexity.value:.3f} of the source, {found.perplexity.value:.3f} in int8")
    print(f"KL divergence  {agreement.kl.mean:.5f} nats a token")
    print(f"top-1          {agreement.top1:.1%} of {found.scored} tokens")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except quantize8.Quantize8Error as error:
        sys.exit(str(error))
