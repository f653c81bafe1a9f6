"""Data: manifests, prompts, the batch plan and the pipeline that follows it."""
