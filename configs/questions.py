"""Spoken questions: half of the quickstart's recipe goes on commands to write down, half on questions to answer.

The answers to learn from are the LLM's own. This writes them:

    aura-jax data continue sample_data/questions/train.jsonl --config=configs/questions.py --prompt "" \
        --max-new-tokens 96 --output runs/questions/train.jsonl
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.data.prompt = "Repeat what I said."  # after a command; a question is a turn by itself
    # Some 1,600 and 230 clips.
    c.data.train = (("sample_data/commands/train.jsonl", 1.0), ("runs/questions/train.jsonl", 7.0))
    c.eval.sets = {
        "new voices": "sample_data/questions/test_new_voices.jsonl",
        "new questions": "sample_data/questions/test_new_questions.jsonl",
        "new voices and questions": "sample_data/questions/test_new_voices_and_questions.jsonl",
        "commands, new voices": "sample_data/commands/test_new_voices.jsonl",
    }
    c.eval.max_new_tokens = 96
    return c
