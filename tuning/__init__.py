"""The paper's other half: tasks, LoRA fine-tuning, evaluation."""
