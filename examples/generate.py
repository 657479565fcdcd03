"""Load a floating-point checkpoint in int8 with transformers, and continue a prompt with greedy decoding.

python examples/generate.py SOURCE PROMPT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize8 import Int8Config, Int8Linear


def main(source: str, prompt: str) -> None:
    """Print the number of int8 layers, the memory that the model takes, and up to 20 new tokens."""
    config = Int8Config(load_in_8bit=True, mode="dynamic")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    layers = sum(isinstance(module, Int8Linear) for module in model.modules())
    print(f"{layers} layers in int8, {model.get_memory_footprint():,} bytes")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
