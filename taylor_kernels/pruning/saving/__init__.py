"""What a run, and a pruned model, leave on a disk, and what is made of it again."""
