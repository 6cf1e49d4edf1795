"""Logits of recipes/pretrained.py's GPT beside transformers', on questions of GSM8K.

    python results/llm/pretrained_check.py MODEL GSM8K [QUESTIONS]      its line in pretrained.txt

(pip install transformers; QUESTIONS, 20 by default, is how many of train.jsonl to compare.)
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import llm_rlvr
import pretrained

if len(sys.argv) < 3:
    raise SystemExit("pretrained_check.py: give the folders MODEL and GSM8K")
folder, data, count = (*sys.argv[1:], "20")[:3]
library, tokenizer = pretrained.read_folder(folder)
model, vocabulary = pretrained.as_gpt(library), pretrained.Vocabulary(library, tokenizer)
lines = (Path(data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
longest, difference, largest = 0, 0.0, 0.0
for line in lines[:int(count)]:
    ids = torch.tensor([vocabulary.encode(json.loads(line)["question"])])
    mask, pos = llm_rlvr.causal(ids)
    with torch.no_grad():
        h = model(ids, pos, lambda _, q, k, v: llm_rlvr.attention(q, k, v, mask))
        ours, theirs = model.lm_head(h), library(ids).logits
    longest = max(longest, ids.shape[1])
    difference = max(difference, (ours - theirs).abs().max().item())
    largest = max(largest, theirs.abs().max().item())
print(f"logits of {count} questions of up to {longest} tokens: largest difference "
      f"{difference:.1e}, largest {largest:.1f}")
