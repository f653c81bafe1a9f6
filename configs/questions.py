"""Spoken questions and commands, answered: all that it learns is what the LLM itself says to their text (KD).

These write what it says, or how it begins to:

    aura-jax data continue sample_data/questions/train.jsonl --config=configs/questions.py \
        --max-new-tokens 32 --output runs/questions/questions.jsonl
    aura-jax data continue sample_data/commands/train.jsonl --config=configs/questions.py \
        --max-new-tokens 32 --output runs/questions/commands.jsonl
"""

from configs import quickstart


def get_config():
    c = quickstart.get_config()
    # Some 1,450 and 230 clips. A command, or a question, is a turn by itself.
    c.data.train = (("runs/questions/commands.jsonl", 1.0), ("runs/questions/questions.jsonl", 6.0))
    c.data.prompt = ""
    c.kd.temperature = 2.0
    c.train.stages.joint.objectives.update(lm=0.0, response_kd=1.0)
    c.eval.sets = {
        "new voices": "sample_data/questions/test_new_voices.jsonl",
        "new questions": "sample_data/questions/test_new_questions.jsonl",
        "new voices and questions": "sample_data/questions/test_new_voices_and_questions.jsonl",
    }
    c.eval.max_new_tokens = 96
    return c
