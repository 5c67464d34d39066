"""Answer a prompt with the model in this folder: python generate.py "Why is the sky blue?"

Needs only: pip install torch transformers accelerate, and what config.json names as quant_method
"""

import logging
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

folder = Path(__file__).resolve().parent
prompt = " ".join(sys.argv[1:]) or "Explain in two sentences why the sky is blue."
device = "cuda:0" if torch.cuda.is_available() else "cpu"
transformers_logging.disable_progress_bar()
# On a CPU it warns that an optional package with faster kernels is absent; nothing is wrong.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()

if tokenizer.chat_template:
    messages = [{"role": "user", "content": prompt}]
    prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(device)

start = time.perf_counter()
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
output = model.generate(**inputs, max_new_tokens=200, streamer=streamer, pad_token_id=padding)
seconds = time.perf_counter() - start

tokens = output.shape[1] - inputs["input_ids"].shape[1]
try:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:  # Windows; psutil comes with accelerate
    import psutil

    memory = psutil.Process().memory_info()
    peak = getattr(memory, "peak_wset", memory.rss)
peak = torch.cuda.max_memory_allocated() if device != "cpu" else peak
print(f"\n{tokens} tokens, {tokens / seconds:.1f} tokens/s, peak memory {peak / 1e9:.2f} GB on {device}")
