"""The posterior by mean-field theory."""
