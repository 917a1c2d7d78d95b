"""What several tests share: tiny models, facts and small runs, independent references."""
