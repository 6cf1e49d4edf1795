"""Compare llm_rlvr.py's reading of a checkpoint with transformers', on every text of GSM8K's training set.

    python results/pretrained_check.py MODEL GSM8K      (pip install safetensors transformers; printed: results/pretrained.txt)
"""
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import llm_rlvr

folder, data = map(Path, sys.argv[1:])
enc, end, encode = llm_rlvr.read_tokenizer(folder)
peer = AutoTokenizer.from_pretrained(folder)
rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
texts = [text for row in rows for text in (row["question"], row["answer"])]
other = sum(enc.encode(text, allowed_special="all") != peer.encode(text, add_special_tokens=False) for text in texts)
print(f"token ids: {other} of {len(texts)} texts differ")

chats = [[{"role": "user", "content": row["question"]}] for row in rows[:500]]
other = sum(encode(chat[0]["content"]) != peer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats)
print(f"chat prompts: {other} of {len(chats)} differ")

model, ids = llm_rlvr.read_model(folder), torch.tensor([encode(rows[0]["question"])])
mask, pos = llm_rlvr.causal(torch.ones_like(ids, dtype=torch.bool))
with torch.no_grad():
    ours, theirs = model.lm_head(model(ids, pos, lambda _, *qkv: llm_rlvr.attention(*qkv, mask))), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
print(f"logits of {ids.shape[1]} tokens: largest difference {(ours - theirs).abs().max():.1e}, largest {theirs.abs().max():.1f}")
