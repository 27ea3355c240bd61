"""The commands that train nothing: planning, measuring, inspecting, launching."""
