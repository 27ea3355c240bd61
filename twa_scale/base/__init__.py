"""What everything else uses: tensor names, spans, bounded reading of files, time and memory."""
