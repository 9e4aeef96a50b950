"""Services of the machine: files on disk or in a bucket, child processes, devices, signals and time accounting."""
