"""`qlora generate`, `qlora chat` and `qlora eval --generate` on the embedded base and a run of it.

The run is trained on prompt and completion rows; the embedded base has a chat template.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.jobs import chat as chat_job
from qlora_cli.jobs import generate as generate_job
from qlora_cli.jobs.results import GenerateResult
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

PROMPT = ("--prompt", "name: Copper Swan", "--max-new-tokens", "8")


def test_a_prompt_is_formatted_as_the_training_rows_were(run: Path) -> None:
    trained = qlora("generate", run, *PROMPT, "--json")
    assert trained.json["format"] == "plain"
    assert "as the completion rows in training were" in trained.err
    base = qlora("generate", "starter", *PROMPT, "--json")
    assert base.json["format"] == "chat"
    assert "the model's chat template; --raw sends it as it is" in base.err
    raw = qlora("generate", "starter", *PROMPT, "--raw", "--json").json
    assert raw["format"] == "plain"
    assert raw["text"] != base.json["text"]


def test_a_merged_model_gets_prompts_as_the_run_does(run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert qlora("merge", run, "--out", merged).code == 0
    outcome = qlora("generate", merged, *PROMPT, "--json")
    assert outcome.json["format"] == "plain"
    assert "as the completion rows in training were" in outcome.err
    # A merge of an older version does not record the format.
    manifest = json.loads((merged / "merge.json").read_text())
    (merged / "merge.json").write_text(json.dumps({**manifest, "data_format": None}))
    assert qlora("generate", merged, *PROMPT, "--json").json["format"] == "chat"


def test_the_streamed_text_is_the_answer(run: Path) -> None:
    answer = qlora("generate", run, *PROMPT, "--json").json["text"]
    assert qlora("generate", run, *PROMPT).out == f"{answer}\n"
    stop = answer[2:4]
    cut = qlora("generate", run, *PROMPT, "--stop", stop).out
    assert cut == answer[: answer.index(stop)] + "\n"


def test_a_system_prompt_needs_the_chat_template(run: Path) -> None:
    with_system = qlora("generate", "starter", *PROMPT, "--system", "Be brief.", "--json").json
    assert with_system["text"] != qlora("generate", "starter", *PROMPT, "--json").json["text"]
    refused = qlora("generate", run, *PROMPT, "--system", "Be brief.")
    assert refused.code == 2
    assert "a system prompt needs the chat template" in refused.err


def test_prompts_of_a_file_become_json_lines(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("name: Copper Swan\n\nname: Red Fox\n")
    arguments = ("--prompts", prompts, "--max-new-tokens", "4")
    assert qlora("generate", run, *arguments, "--out", out).code == 0
    lines = out.read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["name: Copper Swan", "name: Red Fox"]
    assert qlora("generate", run, *arguments).out.splitlines() == lines
    assert f"{out} exists" in qlora("generate", run, *arguments, "--out", out).err


def test_interrupted_answers_are_kept_and_resumed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out, whole = (tmp_path / name for name in ("prompts.txt", "out", "whole"))
    prompts.write_text("name: Copper Swan\nname: Red Fox\nname: Blue Hen\n")
    arguments = ("generate", run, "--prompts", prompts, "--max-new-tokens", "4")
    arguments += ("--temperature", "0.9")
    assert qlora(*arguments, "--out", whole).code == 0
    answer = generate_job.Prompter.answer

    def interrupted(self: generate_job.Prompter, prompt: generate_job.Prompt) -> GenerateResult:
        if prompt.text == "name: Red Fox":
            raise KeyboardInterrupt
        return answer(self, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(generate_job.Prompter, "answer", interrupted)
        stopped = qlora(*arguments, "--out", out)
    assert stopped.code == 130
    assert "add --resume to the same command" in stopped.err
    assert out.read_text() == whole.read_text().splitlines(keepends=True)[0]
    assert qlora(*arguments, "--out", out, "--resume").code == 0
    assert out.read_text() == whole.read_text()
    assert qlora(*arguments, "--out", out, "--resume").code == 0
    assert out.read_text() == whole.read_text()
    assert "--resume: it needs --out" in qlora(*arguments, "--resume").err


def test_prompts_may_be_chats(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    question = [{"role": "user", "content": "Hi"}]
    answered = [*question, {"role": "assistant", "content": "Hello"}]
    rows = [{"prompt": "Hi"}, {"messages": answered}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = qlora("generate", "starter", "--prompts", prompts, "--max-new-tokens", "4")
    first, second = map(json.loads, outcome.out.splitlines())
    assert second["prompt"] == question
    assert first["text"] == second["text"]
    prompts.write_text('{"question": "Hi"}\n')
    refused = qlora("generate", "starter", "--prompts", prompts)
    assert refused.code == 2
    assert "it has no prompt and no messages" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one of --prompt and --prompts"),
        (("--prompt", "a", "--out", "new"), "--out: it needs --prompts"),
        (("--prompt", "a", "--top-p", "0.5"), "no effect at temperature 0"),
        (("--prompt", "a", "--use", "bse"), "did you mean base?"),
    ],
    ids=str,
)
def test_options_that_cannot_be_obeyed_are_refused(
    arguments: tuple[str, ...], message: str
) -> None:
    outcome = qlora("generate", "starter", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "load" not in outcome.err


def test_an_adapter_alone_is_refused_with_the_way_to_use_it(run: Path, tmp_path: Path) -> None:
    foreign = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for command in (("generate", foreign, *PROMPT), ("chat", foreign)):
        outcome = qlora(*command)
        assert outcome.code == 2
        assert f"--adapter x={foreign}" in " ".join(outcome.err.split())
    assert f"name the run's folder: {run}" in " ".join(
        qlora("generate", run / "adapter", *PROMPT).err.split()
    )


def test_chat_commands(run: Path) -> None:
    lines = "/help\nHello\n/reset\nHello\n/system Be brief.\nHello\n/foo\n\n"
    outcome = qlora("chat", run, "--max-new-tokens", "6", stdin=lines)
    assert outcome.code == 0, outcome.err
    first, again, _ = outcome.out.splitlines()[:3]
    assert first == again
    assert "run answers. /help lists the commands" in outcome.err
    assert "/use NAME       answer with another adapter (base, run)" in outcome.err
    assert "the system prompt is set; the conversation starts over" in outcome.err
    assert "there is no command /foo" in outcome.err


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = chat_job.Chat.reply
    chats = []

    def interrupted(self: chat_job.Chat, text: str, on_text: chat_job.OnText | None = None) -> str:
        def stop_at_first(piece: str) -> None:
            if on_text is not None:
                on_text(piece)
            if text == "long":
                raise KeyboardInterrupt

        chats.append(self)
        return reply(self, text, stop_at_first)

    monkeypatch.setattr(chat_job.Chat, "reply", interrupted)
    outcome = qlora("chat", run, "--max-new-tokens", "6", stdin="long\nHello\n\n")
    assert outcome.code == 0, outcome.err
    assert "stopped" in outcome.err
    roles = [message["role"] for message in chats[0].messages]
    assert roles == ["user", "assistant"] * 2


def test_eval_writes_answers_next_to_references(run: Path, held_out: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    arguments = ("eval", run, "--data", held_out, "--generate", out, "--max-new-tokens", "4")
    outcome = qlora(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["reference"] for answer in answers] == [row["completion"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert answer["prompt"].endswith(row["prompt"])
    prompt = ("--prompt", rows[0]["prompt"], "--max-new-tokens", "4")
    assert qlora("generate", run, *prompt, "--json").json["text"].strip() == answers[0]["answer"]
    assert "exists" in qlora(*arguments).err


def test_beam_search_gives_the_answers_of_transformers(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/models/stories260K"
    rows, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    prompt = "Once upon a time, there was a dog"
    rows.write_text(json.dumps({"prompt": prompt, "completion": " named Max."}) + "\n")
    arguments = ("eval", folder, "--data", rows, "--max-new-tokens", "24", "--generate")
    assert qlora(*arguments, out, "--beams", "4").code == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = {}
    for beams in (1, 4):
        output = model.generate(ids, max_new_tokens=24, num_beams=beams, do_sample=False)
        found[beams] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert json.loads(out.read_text())["answer"] == found[4]
    assert found[1] != found[4], "the search makes a difference here"


def test_eval_refuses_answers_to_rows_without_a_prompt(run: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text('{"text": "One sentence."}\n')
    outcome = qlora("eval", "starter", "--data", rows, "--generate", out)
    assert outcome.code == 2
    assert "--generate needs rows with a prompt" in outcome.err
    assert not out.exists()


def test_a_prompt_with_a_token_that_the_model_does_not_have_is_refused(
    shared: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(shared / "data/models/stories260K", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    outcome = qlora("generate", model, "--prompt", "Once <new>")
    assert outcome.code == 2
    assert "the prompt contains '<new>', which the model does not have" in outcome.err
