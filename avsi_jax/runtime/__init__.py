"""What the machine provides: files on disk or in a bucket, processes, devices, signals, time accounting."""
