"""The run of one worker. Knows no Ray: the same code runs under torchrun or in one process."""
