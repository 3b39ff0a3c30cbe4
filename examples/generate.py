"""Load a saved checkpoint with plain transformers, no hf_sdp, and print a text it generates: ``generate.py FOLDER``."""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--prompt", default="def __init__(self")
parser.add_argument("--max_new_tokens", type=int, default=60)
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(arguments.folder)
tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
assert "hf_sdp" not in sys.modules  # the checkpoint is a standard one

prompt = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False, repetition_penalty=1.3)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
