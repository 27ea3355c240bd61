"""The commands without training: planning, measuring, inspecting, launching and reporting."""
