"""llm_rlvr.py's Trainer on a pretrained Llama, Qwen2 or Qwen3 in a Hugging Face folder.

    pip install "transformers>=4.56,<6"
    python recipes/pretrained.py DIR --task gsm8k --data FOLDER     train.jsonl and test.jsonl
    python recipes/pretrained.py DIR --task jsonl --data FILE.jsonl      your own lines
    python recipes/pretrained.py DIR --task rg:chain_sum                 pip install reasoning-gym

transformers (tested: 4.56.2, 4.57.6, 5.24.0) reads and writes config, weights and tokenizer. The
weights go into llm_rlvr.GPT under the same names, so that its sampler and its shared-prompt
forward are used; a model that GPT cannot be is refused. A prompt is one user message in the
model's chat template, or the bare text if it has none; a completion ends at any of the model's
end tokens. One device: for several, see recipes/trl_tpo.py and recipes/verl_tpo.py.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import llm_rlvr
from llm_rlvr import GPT, ModelConfig, fail, flag
from text_tasks import make_task


# --------------------------------------------------------------------------------------- settings
def again(name, default):
    """A flag of llm_rlvr.py with another default."""
    return flag(default, **llm_rlvr.Config.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Config(llm_rlvr.Config):
    init_from: str = flag("", "the model's folder: what stands before all flags")
    task: str = flag("gsm8k", "gsm8k, jsonl (your own lines), rg:NAME (a dataset of Reasoning "
                              "Gym), or one of llm_rlvr.py's")
    data: str = flag("", "folder of train.jsonl and test.jsonl (gsm8k), or the .jsonl file (jsonl)")
    shots: int = flag(0, "solved gsm8k examples before each, for models without a chat template")
    lora_rank: int = flag(0, "train low-rank branches of this rank instead of the weights, which "
                             "on CUDA are kept in bf16; 0 trains the weights")
    export: str = flag("", "folder for the trained model and its tokenizer")
    steps: int = again("steps", 100)
    prompts: int = again("prompts", 16)                 # and the learning rate: the paper's
    epochs: int = again("epochs", 1)
    lr: float = flag(1e-5, "AdamW learning rate: rises over 30 updates, then falls to 0", 1e-12, 1)
    anchor: float = again("anchor", 0.0)                # results/long/README.md says why
    eval_every: int = again("eval_every", 10)
    eval_puzzles: int = again("eval_puzzles", 64)
    max_new_tokens: int = again("max_new_tokens", 256)
    micro_tokens: int = again("micro_tokens", 2048)
    warm_steps: int = 0                                 # from here on no flags
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2


# ------------------------------------------------------------------------------- model and tokens
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
            for block in model.model["layers"]:
                block.self_attn.q_norm = block.self_attn.k_norm = nn.Identity()
    model.load_state_dict(weights, assign=True)
    if c.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.inv_freq = library.model.rotary_emb.inv_freq
    return model


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

    def encode(self, text):
        if not self.tokenizer.chat_template:
            return self.tokenizer(text).input_ids
        message = {"role": "user", "content": text}
        return self.tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, enable_thinking=False, return_dict=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------- LoRA
def add_lora(model, rank, dtype):
    """y = W x + 2 B A x (Hu et al., arXiv 2106.09685, alpha = 2 rank) in the matrices of blocks.

    Only A and B, which is 0 at first, are trained. W is kept in dtype: on CUDA autocast would
    round it again for every token.
    """
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(dtype)
        if name.endswith("_proj"):
            width_out, width_in = module.weight.shape
            module.A = nn.Parameter(torch.randn(rank, width_in) * width_in ** -0.5)
            module.B = nn.Parameter(torch.zeros(width_out, rank))
            module.register_forward_hook(add_branch)


def add_branch(module, inputs, y):
    return y + 2 * F.linear(F.linear(inputs[0], module.A), module.B)


@torch.no_grad()
def merged(model):
    """The weights by their names in transformers, fp32, with their branches added."""
    weights = {name: x.cpu().float() for name, x in model.state_dict().items()}
    for name in [name for name in weights if name.endswith(".A")]:
        A, B = weights.pop(name), weights.pop(name[:-1] + "B")
        weights[name[:-1] + "weight"] = weights[name[:-1] + "weight"] + 2 * B @ A
    return weights


# ---------------------------------------------------------------------------------------- trainer
class Pretrained(llm_rlvr.Trainer):
    """RL with verifiable rewards on a pretrained model: recipes/pretrained.py DIR, then flags."""
    Config, tuned = Config, {}

    @staticmethod
    def find_task(c):
        if c.lora_rank < 0:
            fail(f"--lora-rank {c.lora_rank}: allowed are 0 or more")
        if c.export and "," in c.algo:
            fail(f"--export {c.export}: allowed with one algorithm, not with a list")
        try:
            os.makedirs(c.export or ".", exist_ok=True)
        except OSError as error:
            fail(f"--export {c.export}: cannot be written ({error.strerror})")
        return make_task(c.task, c.data, c.shots)

    def build(self):
        library, tokenizer = read_folder(self.c.init_from)
        model = as_gpt(library)
        if self.c.lora_rank:
            cuda = self.device.type == "cuda"
            add_lora(model, self.c.lora_rank, torch.bfloat16 if cuda else torch.float32)
        return Vocabulary(library, tokenizer), model

    def make_optimizers(self):
        return [(torch.optim.AdamW(self.trained, **llm_rlvr.ADAMW), 1.0)]

    def run(self, folder, stop=()):
        records = super().run(folder, stop)
        if self.c.export:
            library, tokenizer = read_folder(self.c.init_from)
            library.load_state_dict(merged(self.model))
            library.save_pretrained(self.c.export)
            tokenizer.save_pretrained(self.c.export)
            print(f"wrote the model to {self.c.export}")
        return records


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--init-from", *argv]
    llm_rlvr.main(argv, Pretrained)


if __name__ == "__main__":
    main()
