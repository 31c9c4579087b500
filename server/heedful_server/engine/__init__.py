"""The engine child process: scheduler, step loop, sampling, detokenising."""
