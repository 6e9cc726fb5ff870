"""The posterior by sampling."""
