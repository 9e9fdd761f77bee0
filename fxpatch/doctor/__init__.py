"""What an engineer runs first on a new device, real or simulated: probes in processes of their own, and one report."""
