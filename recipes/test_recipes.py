"""pytest: the recipes. A test is skipped where a package that it needs is not installed."""
import copy
import importlib
import inspect
import itertools
import json
import math
import random
import re
import sys
from dataclasses import fields
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
import llm_rlvr
import pretrained
import rg_score
import text_tasks
from test_tpo import close, each, grad, logged, one_line, same_random_numbers
from tpo import tpo_loss, tpo_target


# ---- recipes/pretrained.py, recipes/text_tasks.py ------------------------------------------------

WORDS = ["<end>", "<stop>", "<bos>", "<user>", "<think>", *"abcdefghijklmnopqrstuvwxyz",
         *"0123456789.<>"]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<user>{{ m.content }}{% endfor %}"
            "{% if not enable_thinking %}<think>{% endif %}")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def hub_folder(folder, family="Qwen3", ends=0, template=TEMPLATE, **settings):
    """A tiny random transformers model with a tokenizer of single characters, saved."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=2, eos_token_id=ends, **settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)               # biases and norms must count as well
    model.save_pretrained(folder, max_shard_size="20KB")
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<end>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    t.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    t.add_special_tokens(WORDS[:4])
    t.add_tokens(WORDS[4:5])                            # not special, but the template's
    names = dict(bos_token="<bos>", eos_token="<stop>", chat_template=template)
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    return str(folder), model


def logits(model, ids):
    """(B, S, V) by one ordinary causal forward."""
    mask, pos = llm_rlvr.causal(ids)
    return model.lm_head(model(ids, pos, lambda _, q, k, v: llm_rlvr.attention(q, k, v, mask)))


def jsonl(folder):
    """Flags of a task of 90 lines."""
    lines = [json.dumps({"prompt": f"{i}+1", "answer": i % 10}) for i in range(90)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return ["--task", "jsonl", "--data", str(folder / "lines.jsonl")]


def trainer(folder, *flags):
    flags = ["--init-from", folder, *flags, "--eval-puzzles", "2", "--device", "cpu"]
    return pretrained.Pretrained(llm_rlvr.parse(flags, pretrained.Pretrained)[0])


@each("family, settings", [
    ("Llama", dict(rope_scaling=LLAMA3, tie_word_embeddings=False)),
    ("Qwen2", dict(tie_word_embeddings=True)), ("Qwen3", dict(head_dim=12))])
def test_weights_are_bit_equal_and_logits_are_the_librarys(family, settings, tmp_path):
    folder, peer = hub_folder(tmp_path, family, **settings)
    model, weights = pretrained.as_gpt(pretrained.read_folder(folder)[0]), peer.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (family == "Qwen2") and all(p.requires_grad for p in model.parameters())
    for S in (3, 200):                  # on both sides of original_max_position_embeddings
        ids = torch.randint(0, 48, (2, S))
        close(logits(model, ids), peer(ids).logits, atol=5e-5, rtol=1e-4)
    if family == "Llama":               # and the scaling counts
        model.inv_freq = 5e4 ** -(torch.arange(0, 8, 2) / 8)
        assert (logits(model, ids) - peer(ids).logits).abs().max() > 0.01


@each("template, ends, prompt, expected", [
    (TEMPLATE, 3, "<bos><user>a4<think>", [3]), (None, [4, 0], "<bos>a4", [4, 0]),
    (TEMPLATE, None, "<bos><user>a4<think>", [1])])
def test_prompt_is_the_chat_template_or_bare_text_and_every_end_ends(
        template, ends, prompt, expected, tmp_path):
    folder, _ = hub_folder(tmp_path, ends=ends, template=template)
    vocabulary = pretrained.Vocabulary(*pretrained.read_folder(folder))
    assert vocabulary.decode(vocabulary.encode("a4")).replace(" ", "") == prompt
    assert vocabulary.decode([7, 41, 47]) == "c ." and vocabulary.size == 48    # 47 has no text
    assert vocabulary.decode([7, 3, 8]) == "c <user> d"         # sampled in the midst: not hidden
    data = "a<stop><<end>4<bos>" + "<think>" * bool(template)   # what spells one in data is text
    ids = vocabulary.encode(data)
    assert vocabulary.decode(ids).replace(" ", "") == prompt.replace("a4", data)
    assert [i for i in ids if i < 5] == [i for i in vocabulary.encode("a4") if i < 5]
    assert vocabulary.ends == trainer(folder, *jsonl(tmp_path)).ends.tolist() == expected


@each("changes, words", [
    (dict(architectures=["GPT2LMHeadModel"]), "architectures GPT2LMHeadModel LlamaForCausalLM"),
    (dict(attention_bias=True), "attention_bias True allowed: False"),
    (dict(mlp_bias=True), "mlp_bias True"), (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' 'silu'"),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantization_config gptq"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type 'yarn' 'llama3'"),
    (dict(num_hidden_layers=3), "missing_keys model.layers.2."),
    (dict(num_hidden_layers=1), "unexpected_keys model.layers.1."),
    (dict(hidden_size=36), "cannot be read")])
def test_a_model_that_does_not_fit_is_refused_by_name(changes, words, tmp_path, capsys):
    folder, _ = hub_folder(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    capsys.readouterr()                                                     # a progress bar
    one_line(capsys, f"{folder} {words}", lambda: pretrained.read_folder(folder))


def test_lora_starts_at_the_model_trains_its_branches_and_merges_in_fp32():
    torch.manual_seed(1)
    model = llm_rlvr.GPT(llm_rlvr.ModelConfig(20, 32, 2, 4, 2, 8, 48, qkv_bias=True))
    for p in model.parameters():
        p.data = p.data.bfloat16().float()                                  # stored in bf16
    names, ids = list(model.state_dict()), torch.randint(0, 20, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model, ids)
        pretrained.add_lora(model, 4, torch.bfloat16)
        assert torch.equal(logits(model, ids), before)
        logits(model, ids).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(name[-7:-1] == "_proj." for name in trained)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    up = model.model.layers[0].mlp.up_proj
    assert 0.7 < up.A.std() * 32 ** 0.5 < 1.3
    torch.nn.init.normal_(up.B, std=1e-4)                       # too small for bf16's 8 bits
    weights = pretrained.merged(model)
    assert list(weights) == names and not weights["lm_head.weight"].requires_grad
    merged = weights["model.layers.0.mlp.up_proj.weight"]
    assert up.weight.dtype == torch.bfloat16 and not torch.equal(merged, up.weight.float())
    assert torch.equal(merged, up.weight.float() + 2 * up.B @ up.A)


@each("extra", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
def test_run_resume_and_export_to_transformers(extra, tmp_path, capsys):
    folder, peer = hub_folder(tmp_path / "model", ends=[0, 1, 3], tie_word_embeddings=True)
    flags = [*jsonl(tmp_path), *extra, "--lr", "1e-2", "--prompts", "2", "--candidates", "4",
             "--max-new-tokens", "12", "--algo", "tpo_no_anchor", "--steps", "2",
             "--eval-every", "1"]
    run = [folder, *flags, "--eval-puzzles", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    hub_folder(tmp_path / "1")                  # in several files, with an index of the old ones
    mine, stale = {"notes.txt", "tokenizer.py", "model.md"}, {"merges.txt", "tokenizer.4.0.0.json"}
    for name in mine | stale:
        (tmp_path / "1" / name).write_text("{}")
    pretrained.main([*run, "--export", str(tmp_path / "1")])
    found = {path.name for path in tmp_path.glob("1/*")}
    assert mine <= found and not found & stale and "index" not in "".join(found)
    assert "took jsonl from" in capsys.readouterr().out
    pretrained.main([*run, "--resume", "--export", str(tmp_path / "2")])
    ours, ids = trainer(folder, *flags).model, torch.randint(0, 48, (2, 9))
    saved = torch.load(tmp_path / "out/jsonl-tpo_no_anchor-0/checkpoint.pt")["model"]
    ours.load_state_dict(saved, strict=False)
    for name in "12":
        again, tokenizer = pretrained.read_folder(str(tmp_path / name))
        assert pretrained.Vocabulary(again, tokenizer).ends == [0, 1, 3]
        assert tokenizer.chat_template == TEMPLATE
        close(again(ids).logits, logits(ours, ids), atol=5e-5, rtol=1e-4)
    before = peer.state_dict()
    moved = {name for name, x in again.state_dict().items() if not torch.equal(x, before[name])}
    assert moved and (not extra or all("_proj" in name for name in moved))
    resource = pytest.importorskip("resource", reason="Windows cannot limit a file's size")
    files, limit = {p: p.read_bytes() for p in tmp_path.glob("1/*")}, resource.RLIMIT_FSIZE
    resource.setrlimit(limit, (20_000, hard := resource.getrlimit(limit)[1]))       # a full disk
    write = partial(pretrained.export, again, tokenizer, tmp_path / "1")
    one_line(capsys, f"--export {tmp_path}/1: cannot intact --resume", write, status=1)
    resource.setrlimit(limit, (hard, hard))
    assert {p: p.read_bytes() for p in tmp_path.glob("1/*")} == files


def test_flags(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        pretrained.main(["--help"])
    assert "--lora-rank" in (text := capsys.readouterr().out) and "--kv-heads" not in text
    c = pretrained.Config()
    assert (c.task, c.epochs, c.anchor, c.warm_steps) == ("gsm8k", 1, 0, 0)
    for flags in [*jsonl(tmp_path), "--algo", "lpo"], ["--task", "addition"]:   # as of no small GPT
        c, = llm_rlvr.parse(flags, pretrained.Pretrained)
        assert (c.lr, c.max_new_tokens) == (1e-5, 256)
    for flags, words in ((["--lora-rank", "-1"], "--lora-rank -1"), (["--width", "8"], "--width"),
                         (["--algo", "tpo,grpo", "--export", "x"], "--export x one algorithm"),
                         (["--export", "/dev/full"], "--export /dev/full no folder"),
                         (["--export", f"{tmp_path}/new/x"], "DIR no such folder")):
        one_line(capsys, words, lambda: pretrained.main(["DIR", *jsonl(tmp_path), *flags]))
    assert not (tmp_path / "new").exists()
    pytest.importorskip("transformers", reason="pip install transformers")
    one_line(capsys, f"{tmp_path} config.json", lambda: pretrained.read_folder(str(tmp_path)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    one_line(capsys, "pip install transformers", lambda: pretrained.read_folder(str(tmp_path)))


def test_prompts_longer_than_the_context_are_told_and_left_out(tmp_path, capsys):
    folder, _ = hub_folder(tmp_path, max_position_embeddings=30)
    flags = jsonl(tmp_path)                             # "0+1" to "89+1" and the template's three
    task = trainer(folder, *flags, "--max-new-tokens", "24").task
    assert {len(text) for text, _ in task.items} == {3}
    assert "6 tokens" in (err := capsys.readouterr().err) and "80 of 90" in err and "has 7" in err
    one_line(capsys, "--max-new-tokens 5 tokens 10 of 10 longest 6",
             lambda: trainer(folder, *flags, "--max-new-tokens", "25"))
    endless = SimpleNamespace(prompt=lambda rng: ("x" * rng.randrange(1, 6), 0))
    text_tasks.leave_out_long(endless, list, 3)
    assert " of 100 are longer, the longest has 5" in capsys.readouterr().err
    assert {len(endless.prompt(random.Random(i))[0]) for i in range(99)} == {1, 2, 3}


def test_number_of_an_answer():
    for case in logged(ROOT / "results" / "reliability" / "answers.jsonl"):
        number = text_tasks.final_number(case["text"])
        assert number == (case["number"] and Decimal(case["number"])), case
    for piece in ("9", "1,", "1/", " 1", "{", r"\boxed{", r"\frac{", "= 5*", "which is", "answer:"):
        for mark in ("", "#### ", "\\boxed{"):          # in a time that grows as the text does
            pretrained.final_number(mark + piece * 10**4)
    assert pretrained.final_number("#### " + "9" * 10_000) is None


@each("shots", [0, 2])
def test_gsm8k_splits_shots_and_score(shots, tmp_path):
    for name, numbers in (("train", range(60)), ("test", range(1000, 1020))):
        lines = (json.dumps({"question": f"{i} + 1000?", "answer": f"<<{i}>> #### {i + 1000:,}"})
                 for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    task = text_tasks.make_task("gsm8k", str(tmp_path), shots)
    drawn = [dict(llm_rlvr.puzzles(task, random.Random(0), 400, split))
             for split in ("train", "heldout", "test")]
    train, heldout, test = ({text.split("Question: ")[-1] for text in part} for part in drawn)
    assert test == {f"{i} + 1000?\nAnswer:" for i in range(1000, 1020)}
    asked = {f"{i} + 1000?" for i in range(60)}
    assert heldout == {q + "\nAnswer:" for q in asked if llm_rlvr.hash_split(q) == "heldout"}
    assert len(train) == 60 - len(heldout) - shots                          # a shot is no puzzle
    head, = {text.rpartition("Question: ")[0] for part in drawn for text in part}
    assert head.count("Question: ") == head.count("\nThe answer is 1,0") == shots
    assert head.startswith("Think step by step") and "<<" not in head
    key = next(iter(drawn[0].values()))
    assert task.check(key, f"1 and 1. The answer is {key}.") == 1 > task.check(key, "#### 1")


def test_jsonl_scores_and_bad_lines(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "q", "answer": 3}\n\n{\n[1]\n{"prompt": "q", "answer": null}\n'
                    '{"prompt": " ", "answer": 3}\n{"prompt": "\\ud800", "answer": 3}\n'
                    '{"prompt": "q", "answer": NaN}\n{"prompt": "q", "answer": true}')
    task, err = text_tasks.make_task("jsonl", str(path), 0), capsys.readouterr().err
    assert task.items == [("q", 3)] and err.count("\n") == 1
    assert "7 of 9 lines" in err and ": 3, 4, 5, 6, 7, 8, 9" in err
    for key, text, score in (
            ("3.5", "so 7/2 = 3.50.", 1), ("3.5", "3", 0), ("3.5", "", 0), ("1e-05", "0.00001", 1),
            ("2.5e16", "It is 25,000,000,000,000,000", 1), ('"0"', "0.0", 1), ("0", "none", 0),
            ('"$18"', "The answer is $18.", 1), ('"+18 %"', "18%", 1), ('"5-3"', "2", 0),
            ('"Paris"', "**Answer:** Paris", 1), ('"paris"', "Final answer: **Paris**.", 1),
            ('"Paris"', "Not Paris", 0), ('"*"', "answer:", 0), ('"a*"', "a", 0),
            ('"__init__"', "Answer: init", 0), ('"Paris"', "- answer:\n`Paris`", 1),
            ('"Yes, so"', "Hm.\n answer: yes, SO \n\n", 1), ('"Yes"', "yes\nno", 0),
            (r'"a\nb"', "b", 0), (r'"a\nb"', "A \n\n b\n", 1), (r'"a\nb"', "c\na\nb", 0),
            (r'"a\nb"', "Hm.\nAnswer:\na\nb", 1), (r'"a\nb"', "", 0)):
        path.write_text(f'{{"prompt": "q", "answer": {key}}}')
        (_, answer), = text_tasks.Jsonl(path).items
        assert task.check(answer, text) == score, (key, text)


def test_reasoning_gym_scores_in_a_process_of_its_own_slow(capsys, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    task = text_tasks.make_task("rg:countdown", "", 0)
    text, entry = task.prompt(random.Random(0))
    right, scorer, score = entry["metadata"]["expression"], task.scorer, partial(task.check, entry)
    assert entry["question"] in text and "<answer>" in text
    assert score(f"<answer>z</answer> no: <answer>\n{right} </answer>.") == 1
    assert score(f" {right}\n") == 1 > score(f"{right} <answer>z</answer>")
    assert score("print(1)") + score("input()") + score("'a' * 10**12") < 0.1 and not scorer.told()
    monkeypatch.setattr(rg_score, "SECONDS", 1)
    for deadly, reason in (("7**8**9", "over 1 s"), ("__import__('os')._exit(3)", "ended (3)")):
        assert score(deadly) == 0 and score(right) == 1
        assert "failed: 1, " in (line := scorer.told()) and reason in line
    data = SimpleNamespace(score_answer=lambda answer, entry: eval(answer))
    for answer in ("exit()", "1/0", "None", "'x'", "float('nan')", "1j"):
        assert rg_score.grade(data, answer, {})[0] == 0 < len(rg_score.grade(data, answer, {})[1])
    scorer.child.stdin.close()                          # as when the program ends
    assert scorer.child.wait(9) == 0
    one_line(capsys, "rg:chess9 factory.DATASETS", lambda: text_tasks.make_task("rg:chess9", "", 0))


@each("task, data, shots, words", [
    ("chess", "", 0, "--task chess gsm8k graph_color"), ("jsonl", "", 0, "--data jsonl"),
    ("jsonl", ".", 0, "--data . directory"), ("jsonl", "/dev/null", 0, "--data /dev/null line"),
    ("gsm8k", "/x", 0, "--data /x/train.jsonl"), ("gsm8k", "/x", -1, "--shots -1"),
    ("addition", "x", 0, "--data x addition"), ("rg:x", "", 2, "--shots 2 gsm8k"),
    ("rg:leg_counting", "", 0, "rg:leg_counting pip install reasoning-gym")])
def test_wrong_tasks_and_data_are_one_line(task, data, shots, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    one_line(capsys, words, lambda: text_tasks.make_task(task, data, shots))


# ---- recipes/trl_tpo.py, recipes/verl_tpo.py -----------------------------------------------------

def recipe(name, *needs):
    """recipes/<name>.py as a module; skips the test where a package that it needs is missing."""
    for package in needs:
        pytest.importorskip(package)
    return importlib.import_module(name)


@each("name, anchor", [("tpo", 0.0), ("gdpo", 0.0), ("gdpo", 0.25), ("gdpo", 1.0)])
def test_verl_step_has_the_gradient_of_tpo_loss(name, anchor):
    """From verl's compute_advantage to its gpg loss, in micro-batches that split groups."""
    estimate = recipe("verl_tpo", "verl.trainer.ppo.ray_trainer").tpo_advantage
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer
    uid = np.array(["a", "b", "pad", "a", "b", "a", "c", "b", "pad", "a", "c"], dtype=object)
    lengths = torch.tensor([5, 2, 0, 3, 1, 4, 5, 2, 0, 1, 3])    # verl pads a batch with empty rows
    mask = torch.arange(5) < lengths[:, None]
    logp, rewards = torch.randn(11, 5).requires_grad_(), torch.rand(11, 5) * mask
    rewards[uid == "c"] = 0.1 * mask[uid == "c"] / lengths[uid == "c", None]   # a group at rest
    old = logp.detach()
    batch = dict(token_level_rewards=rewards, response_mask=mask.float(), old_log_probs=old)
    A = ray_trainer.compute_advantage(
        DataProto.from_dict(batch, non_tensors=dict(uid=uid)), name,
        config={"tpo_anchor": anchor, "tpo_eta": 0.5}).batch["advantages"]
    assert (A[uid == "c"] == 0).all()
    expected, total = 0, 0
    for prompt in "abc":
        l, s = ((x * mask)[uid == prompt].sum(-1) for x in (logp, rewards))
        expected += grad(tpo_loss(l, l.detach(), s, 0.5, anchor), logp) / 3
    config = SimpleNamespace(global_batch_info=dict(dp_size=1, global_batch_size=11))
    for rows in ([0, 10, 4], [5, 1, 2, 3], [6, 7, 8, 9]):
        total += core_algos.get_policy_loss_fn("gpg")(
            old[rows], logp[rows], A[rows], mask[rows].float(), "seq-mean-token-sum", config)[0]
    close(grad(total, logp), expected)
    assert expected.abs().max() > 0.01
    with pytest.raises(ValueError, match="tpo_anchor 0.25.*gdpo"):
        estimate(rewards, mask, uid, {"tpo_anchor": 0.25})
    for wrong, words in ((dict(tpo_eta=0), "tpo_eta 0"), (dict(tpo_anchor=2), "tpo_anchor 2"),
                         (dict(use_kl_in_reward=True), "use_kl_in_reward"),
                         (dict(rollout_correction=dict(rollout_is="token")), "correction")):
        with pytest.raises(ValueError, match=words):
            estimate(rewards, mask, uid, wrong)
    estimate(rewards, mask, uid)                                                 # anchor 0


def points(completions, **_):
    """Rewards; for two words NaN, TRL's way to say that nothing scores this completion."""
    return [math.nan if len(text.split()) == 2 else text.count("a") + 0.5 * text.count("b")
            for text in completions]


def trl_run(tmp_path, accumulate=1, epochs=1, anchor=0.0, reward=points, cls=None, **settings):
    """A trainer of a random Qwen3 shape on 8 prompts, K = 4, 2 groups a micro-batch."""
    import datasets
    import tokenizers
    import transformers
    import trl
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijkl"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
        eos_token_id=1, bos_token_id=None))
    model.generation_config.eos_token_id = [1, 5]
    model.generation_config.min_p = settings.pop("model_min_p", None)
    model.config.attention_dropout = settings.pop("model_attention_dropout", 0.0)
    model.dropout = torch.nn.Dropout(0.5)
    defaults = dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", num_generations=4, per_device_train_batch_size=8, num_iterations=epochs,
        gradient_accumulation_steps=accumulate, max_completion_length=6, max_steps=4,
        learning_rate=1e-2, max_grad_norm=0, save_strategy="no", disable_tqdm=True)
    prompts = ["a b c", "d", "e f", "g h i j", "k", "l a", "b d", "c e"]
    return (cls or recipe("trl_tpo").TargetPOTrainer)(
        model, reward_funcs=reward, args=trl.GRPOConfig(**defaults | settings), anchor=anchor,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer)


@each("accumulate, epochs, slices, anchor", [(2, 2, 2, 1.0), (1, 2, 2, 0.0), (1, 1, 1, 0.25)])
def test_slow_trl_step_has_the_gradient_of_tpo_loss(tmp_path, accumulate, epochs, slices, anchor):
    """What the optimizer gets at each step is tpo_loss's gradient over all processes' groups.

    In two: python -m torch.distributed.run --nproc-per-node 2 -m pytest recipes -k trl_step
    """
    trl_tpo = recipe("trl_tpo", "trl")
    import transformers
    from accelerate.utils import gather_object

    class WithTools(trl_tpo.TargetPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return batch | {"tool_mask": (batch["completion_ids"] != 4).long()}

    trainer = trl_run(tmp_path, accumulate, epochs, anchor, cls=WithTools,
                      steps_per_generation=slices)
    tokenizer, rollout, errors = trainer.processing_class, [], []

    def totals(model, rows):
        ids = torch.cat((rows["prompt_ids"], rows["completion_ids"]), 1)
        mask, P = rows["completion_mask"], rows["prompt_ids"].shape[1]
        logits = model(ids, attention_mask=torch.cat((rows["prompt_mask"], mask), 1)).logits
        logp = logits[:, P - 1:-1].log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0]
        return (logp * mask * (ids[:, P:] != 4)).sum(-1).view(-1, 4)

    class Check(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            got = torch.cat([p.grad.flatten() for p in model.parameters()])
            turn = range(state.global_step * accumulate, (state.global_step + 1) * accumulate)
            if turn[0] % (slices * epochs) == 0:
                rollout[:] = gather_object([[dict(part) for part in trainer._buffered_inputs]])
                for rows in itertools.chain(*rollout):
                    rows["old"] = totals(model, rows).detach()
            loss = 0
            for rows in (parts[i % slices] for parts in rollout for i in turn):
                ids, mask = rows["completion_ids"], rows["completion_mask"]
                stop = torch.isin(ids, torch.tensor([1, 5])) * mask
                assert stop.sum(1).max() == 1 and (stop.cumsum(1) - stop)[mask == 1].max() == 0
                assert (rows["prompt_ids"].unflatten(0, (-1, 4)).diff(dim=1) == 0).all()
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                scores = torch.tensor(points(texts)).view(-1, 4)
                loss += tpo_loss(totals(model, rows), rows["old"], scores, anchor=anchor,
                                 mask=~scores.isnan())
            loss = loss / accumulate / len(rollout)
            expected = torch.cat([grad(loss, p).flatten() for p in model.parameters()])
            errors.append(float((got - expected).norm() / expected.norm()))

    trainer.add_callback(Check())
    trainer.train()
    print(f"TRL, {len(rollout)} processes, {accumulate} micro-batches, {epochs} epochs, anchor "
          f"{anchor}: relative gradient errors {[float(f'{e:.1e}') for e in errors]}")
    assert len(errors) == 4 and max(errors) < 1e-4


def test_slow_trl_step_without_signal_moves_no_weight(tmp_path):
    """Two steps fill AdamW's moments; then all rewards are equal, for two steps with decay."""
    recipe("trl_tpo", "trl")
    for anchor in (0.0, 0.25, 1.0):
        weights = []

        def reward(completions, **_):
            weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
            return points(completions) if len(weights) == 1 else [0.1] * len(completions)

        trainer = trl_run(tmp_path, 2, 2, anchor, reward, weight_decay=0.1, logging_steps=1)
        trainer.train()
        reward([])
        assert not weights[0].equal(weights[1]) and weights[1].equal(weights[2]), anchor
        kl = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert kl[0] > kl[1] > 0 == kl[2] == kl[3], kl


def test_trl_settings_that_change_the_loss_or_the_sampling_are_refused(tmp_path):
    trl_tpo = recipe("trl_tpo", "trl")
    ours = trl_tpo.HARMLESS | set(trl_tpo.NEEDED)
    assert not trl_tpo.UNKNOWN and ours <= {f.name for f in fields(trl_tpo.GRPOConfig)}
    args = trl_tpo.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name in sorted(ours):
        changed = copy.copy(args)
        changed.use_vllm, changed.vllm_importance_sampling_correction = "vllm" in name, False
        trl_tpo.refuse(changed)
        setattr(changed, name, 3)
        changed.eval_strategy = "steps"
        if name in trl_tpo.NEEDED or name.startswith("num_generations"):
            with pytest.raises(ValueError, match=f"^{name} 3 |splits groups.*num_generations 3$"):
                trl_tpo.refuse(changed)
        else:
            trl_tpo.refuse(changed)
    for settings, words in ((dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
                             "batch_size 2 splits groups"), (dict(temperature=0.7), "^temperature"),
                            (dict(model_min_p=0.1), "generation_config.*MinP")):
        with pytest.raises(ValueError, match=words):
            trl_run(tmp_path, **settings)
    with pytest.raises(ValueError, match="infinite"):
        trl_run(tmp_path, reward=lambda completions, **_: [math.inf] * len(completions)).train()
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        model = SimpleNamespace(config=None)
        trl_tpo.refuse_model(SimpleNamespace(aux_loss_enabled=True, model=model))
    with pytest.raises(ValueError, match="attention_dropout"):
        trl_run(tmp_path, model_attention_dropout=0.1)
    args.fp16, args.max_grad_norm = True, 0.0
    with pytest.raises(ValueError, match="fp16"):
        trl_tpo.refuse(args)
    for wrong in (dict(eta=0), dict(eta=math.nan), dict(anchor=-1), dict(anchor=2)):
        with pytest.raises(ValueError, match="allowed are eta above 0"):
            trl_tpo.TargetPOTrainer(**wrong)


def test_trl_loss_replaced_by_a_library_is_told(tmp_path):
    ours = recipe("trl_tpo", "trl").TargetPOTrainer
    assert inspect.signature(ours).parameters["anchor"].default == 0
    other = dict(compute_loss=lambda self, model, *_, **__: model.lm_head.weight.sum())
    trainer = trl_run(tmp_path, cls=type("Other", (ours,), other))
    assert trainer.model.dropout.p == 0
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="compute_loss"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


class TinkerEngine:
    """The Tinker API on a bigram table: adds its losses, or divides them as SkyRL's JAX does."""
    chat_template, eos_token_id = None, 0                        # it is its own tokenizer, sampler
    get_tokenizer = save_weights_and_get_sampling_client = lambda self: self

    def __init__(self, divides):
        self.table, self.divides = torch.randn(6, 6, requires_grad=True), divides

    def __call__(self, text):
        return SimpleNamespace(input_ids=text)

    def decode(self, tokens):
        return tokens

    @torch.no_grad()
    def sample(self, prompt, K, params):
        rows = []
        for _ in range(K):
            ids, logps = prompt[-1:], []
            while len(logps) < params.max_tokens and ids[1:][-1:] != params.stop:
                logp = self.table[ids[-1]].log_softmax(-1)
                ids.append(int(logp.exp().multinomial(1)))
                logps.append(float(logp[ids[-1]]))
            reason = "stop" if ids[-1:] == params.stop else "length"
            rows.append(SimpleNamespace(tokens=ids[1:], logprobs=logps, stop_reason=reason))
        return done(sequences=rows)

    def logps(self, rows):
        ids = [(row.model_input, row.loss_fn_inputs["target_tokens"].to_torch()) for row in rows]
        return [self.table[x].log_softmax(-1).gather(-1, y[:, None])[:, 0] for x, y in ids]

    def forward(self, rows, loss):
        return done(loss_fn_outputs=[
            dict(logprobs=tinker_tensor(logp.detach())) for logp in self.logps(rows)])

    def forward_backward(self, rows, loss):
        for row, logp in zip(rows, self.logps(rows)):
            x = {name: value.to_torch() for name, value in row.loss_fn_inputs.items()}
            if loss == "importance_sampling":
                logp = (logp - x["logprobs"]).exp() * x["advantages"]
            by = x["weights"].sum().clamp(min=1e-9) * len(rows) if self.divides else 1
            (-(logp * x["weights"]).sum() / by).backward()
        return done()

    def forward_backward_custom(self, rows, loss_fn):
        logps = [logp.detach().requires_grad_() for logp in self.logps(rows)]
        loss, metrics = loss_fn(rows, logps)
        loss.backward()
        self.forward_backward([tinker_datum(row.model_input, row.loss_fn_inputs | dict(
            weights=-logp.grad)) for row, logp in zip(rows, logps)], "cross_entropy")
        return done(metrics=metrics)

    def optim_step(self, adam):                                           # Adam's with betas 0
        g, self.table.grad = self.table.grad, None
        self.table.data -= adam.learning_rate * g / (g.abs() + adam.eps)
        return done(metrics={"skyrl.ai/grad_norm": float(g.norm())})


def done(**result):
    return SimpleNamespace(result=lambda: SimpleNamespace(**result))


def tinker_tensor(x):
    return SimpleNamespace(to_torch=lambda: x) if torch.is_tensor(x) else x


def tinker_datum(model_input, loss_fn_inputs):
    inputs = {name: tinker_tensor(x) for name, x in loss_fn_inputs.items()}
    return SimpleNamespace(model_input=model_input, loss_fn_inputs=inputs)


def tinker_recipe(monkeypatch, divides):
    monkeypatch.setitem(sys.modules, "tinker", SimpleNamespace(
        AdamParams=lambda **given: SimpleNamespace(**dict(eps=1e-12) | given), Datum=tinker_datum,
        SamplingParams=SimpleNamespace, ModelInput=SimpleNamespace(from_ints=list)))
    return recipe("tinker_tpo"), TinkerEngine(divides)


@each("divides", [False, True])
def test_tinker_slopes_are_tpo_loss_s_and_check_finds_the_wrong_ones(divides, monkeypatch):
    tinker_tpo, engine = tinker_recipe(monkeypatch, divides)
    prompts = [([1], None), ([2, 3], None)]
    rows, scores = tinker_tpo.rollout(engine, prompts, lambda key, y: 1 + len(y) % 5, 4, 8, 0)
    completion = [slice(0, None)] * 4 + [slice(1, None)] * 4       # after prompts of 1 and 2
    N = len(rows)

    def totals():
        logps = engine.logps(rows)
        return torch.stack([logp[at].sum() for logp, at in zip(logps, completion)]).view(2, 4)

    lengths = [len(row.model_input[at]) for row, at in zip(rows, completion)]
    ended = [int(row.loss_fn_inputs["target_tokens"].to_torch()[-1] == 0) for row in rows]
    score = [e * (1 + (T - 1) % 5.0) for T, e in zip(lengths, ended)]           # 0 if cut off
    close(scores, torch.tensor(score).view(2, 4))
    assert len(set(lengths)) > 2 and 0 < sum(ended) < 8
    for anchor in (0.0, 0.25, 1.0):
        loss_fn, old = tinker_tpo.make_loss(scores, 0.5, anchor), totals().detach()
        loss_fn(rows, engine.logps(rows))                          # the first epoch's
        engine.table.data += 0.3 * torch.randn(6, 6)
        loss = tpo_loss(totals(), old, scores, 0.5, anchor)
        expected = grad(loss, engine.table)
        for way in ("importance", "custom"):
            metrics = tinker_tpo.backward(engine, rows, loss_fn, way)
            got, engine.table.grad = engine.table.grad * (N if divides else 1), None
            wrong = way == "custom" and divides
            assert torch.allclose(got, expected, atol=1e-5) != wrong
        q = tpo_target(old, scores, 0.5, anchor)
        close(torch.tensor(metrics["KL"]), loss.detach() + (q * q.log()).sum(-1).mean())
    loss_fn = tinker_tpo.make_loss(scores, 0.5, 0.0)
    way = tinker_tpo.check(TinkerEngine(divides), rows, loss_fn)
    assert way == ("importance" if divides else "custom")


def test_tinker_run_learns_leaves_equal_groups_alone_and_refuses_flags(monkeypatch, capsys):
    tinker_tpo, engine = tinker_recipe(monkeypatch, True)
    start = engine.table.detach().clone()
    monkeypatch.setattr(tinker_tpo, "connect", lambda flags: lambda: engine)

    def run(reward):
        flags = "--prompts 4 --samples 8 --max-tokens 6 --lr .3 --epochs 2 --updates 25".split()
        tinker_tpo.main(lambda rng: ([rng.randrange(1, 6)], None), reward, flags)
        return capsys.readouterr().out.splitlines()
    assert run(lambda key, y: 0)[-1] == "update 25: reward 0.000, KL(q||p) -, informative 0%"
    assert torch.equal(engine.table, start)
    reward = [float(re.search(r"reward (\S+),", line)[1]) for line in run(
        lambda key, y: y.count(3) / max(1, len(y)))]
    assert reward[0] < 0.3 and reward[-1] > 0.6, reward
    for flags in ("--temperature .7", "--top-p .9", "--anchor 2", "--samples 1", "--epochs 0"):
        with pytest.raises(SystemExit, match=flags.split()[0]):
            tinker_tpo.main(None, None, flags.split())
