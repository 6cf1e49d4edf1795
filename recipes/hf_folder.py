"""A pretrained model's folder, in Hugging Face layout: into llm_rlvr.GPT, and back.

transformers (tested: 4.56.2, 4.57.6, 5.24.0) reads and writes config, weights and tokenizer; a
model that GPT cannot be is refused.
"""
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from llm_rlvr import GPT, ModelConfig, fail

INSTALL = 'pip install "transformers>=4.56,<6"'
FAMILIES = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
PLAIN = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
             quantization_config=None)
ROPES = "default", "linear", "llama3"       # the same at every length; cos and sin are not scaled


def read_folder(folder):
    """transformers' model of a folder, in fp32 on the CPU, and its tokenizer."""
    if not os.path.isdir(folder):
        fail(f"DIR {folder!r}: there is no such folder")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        fail(f"transformers is missing: {INSTALL}")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()            # not its table of unfit weights
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        refuse(folder, "architectures", config.architectures, [[name] for name in FAMILIES])
        for name, allowed in PLAIN.items():
            refuse(folder, name, getattr(config, name, allowed), [allowed])
        library, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:                      # a damaged file raises one of many types
        reason = str(error).split("\n")[0]
        fail(f"{folder} cannot be read ({type(error).__name__}: {reason})")
    for kind in ("missing_keys", "unexpected_keys"):
        refuse(folder, kind, sorted(info[kind])[:1], [[]])
    refuse(folder, "rope_type", library.model.rotary_emb.rope_type, ROPES)
    return library, tokenizer


def refuse(folder, name, value, allowed):
    """End the program if the model is none that our GPT can be."""
    if value not in allowed:
        fail(f"{folder} has {name} {value!r}; allowed: {', '.join(map(repr, allowed))}")


def as_gpt(library):
    """Our GPT on the weights of transformers' model."""
    c, weights = library.config, library.state_dict()
    attention = "model.layers.0.self_attn."
    with torch.device("meta"):                      # no time for random weights
        model = GPT(ModelConfig(
            c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
            c.num_key_value_heads, library.model.layers[0].self_attn.head_dim, c.intermediate_size,
            qkv_bias=attention + "q_proj.bias" in weights, eps=c.rms_norm_eps))
        if attention + "q_norm.weight" not in weights:          # only Qwen3 has them
            for block in model.model.layers:
                block.self_attn.q_norm = block.self_attn.k_norm = nn.Identity()
    model.load_state_dict(weights, assign=True)
    if c.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.inv_freq = library.model.rotary_emb.inv_freq
    return model


CUT = "\ufdd0"              # a noncharacter


class Vocabulary:
    """The model's tokens and, of its generation_config.json, the end tokens."""

    def __init__(self, library, tokenizer):
        self.tokenizer, self.size = tokenizer, library.config.vocab_size
        ends = library.generation_config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        if ends is None:
            fail(f"{tokenizer.name_or_path} names no end token; allowed are models that have one")
        self.ends = ends if isinstance(ends, list) else [ends]
        control = (re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()
                   if token.special or token.content in str(tokenizer.chat_template))
        self.control = re.compile(f"(?={'|'.join(control) or '(?!)'})(.)", re.S)

    def encode(self, text):
        """Ids of a prompt. Its own control tokens are cut in two, which makes them text."""
        text, template = self.control.sub(r"\1" + CUT, text), bool(self.tokenizer.chat_template)
        if template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
                enable_thinking=False)
        first, *others = text.split(CUT)
        ids = self.tokenizer(first, add_special_tokens=not template).input_ids
        return ids + sum((self.tokenizer(part, add_special_tokens=False).input_ids
                          for part in others), [])

    def decode(self, ids):
        """The text; a control token in its midst is kept, or 1<|x|>2 would read 12."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# what an earlier model can have left in a folder, where it would be loaded instead or as well
MODEL_FILES = re.compile(
    r"(?:pytorch_|adapter_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?|"
    r"tokenizer(?:\.[\d.]+)?\.json|tokenizer\.model|vocab\.(?:json|txt)|merges\.txt|"
    r"chat_template\.(?:json|jinja)|"
    r"(?:adapter_config|generation_config|tokenizer_config|added_tokens|special_tokens_map)\.json")


def export(library, tokenizer, folder):
    """Write the model into a folder: all of it beside the files there, then in their places."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".new-") as beside:
            library.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            new = os.listdir(beside)
            for name in new:
                if (folder / name).is_dir():
                    raise OSError(f"{name} is a folder there")
            for name in new:
                os.replace(Path(beside) / name, folder / name)
        for path in folder.iterdir():
            if MODEL_FILES.fullmatch(path.name) and path.name not in new:
                path.unlink()
    except Exception as error:                      # safetensors has types of its own
        reason = str(error).split("\n")[0]
        fail(f"--export {folder}: cannot be written ({reason}); what stood there is intact, and "
             "--resume with another --export writes it there", 1)
    print(f"wrote the model to {folder}")
