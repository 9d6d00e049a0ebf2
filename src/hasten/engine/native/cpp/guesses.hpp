// Guesses of what comes next, to be checked all at once: what one pass costs is reading the weights, whether it checks one
// token or five. Whoever guesses, the model's own choice at every place decides, so guesses change the time and not a token.
#pragma once

#include "model.hpp"
#include "sequence.hpp"

#include <memory>

namespace hasten {

// What followed the last few tokens where they stood before (prompt lookup, Saxena 2023); nothing if they are new.
inline void look_up(Sequence& q) {
    const int length = q.length();
    for (int gram = 3; gram >= 2 && q.guesses.empty(); gram--)
        for (int end = length - 1; end >= gram && q.guesses.empty(); end--) {  // the latest place first
            bool same = true;
            for (int i = 1; i <= gram && same; i++) same = q.at(end - i) == q.at(length - i);
            for (int i = end; same && i < length && int(q.guesses.size()) < q.wanted; i++) q.guesses.push_back(q.at(i));
        }
}

// A smaller model that writes ahead (Leviathan et al. 2023, arXiv:2211.17192). Its cache follows the accepted tokens: what it
// has not read is read first, what was refused is written over.
//
// Where tokens are drawn it draws with the very chance that its model will draw with, so the nearer their probabilities,
// the more often both draw the same (Daliri et al. 2025, arXiv:2408.07978).
class Draft {
public:
    Draft(const Shape& shape, Team& team) : s(shape), model(shape, team) {}

    size_t cache_bytes() const { return model.cache_bytes(); }

    // As many guesses as each sequence wants, a token of all of them in every pass. The first also reads what is new: of a
    // prompt that does not fit, the rest comes next time, and until then nothing is guessed after it.
    void guess(const std::vector<std::shared_ptr<Sequence>>& running) {
        std::vector<Sequence*> writing;
        for (auto& q : running)
            if (q->wanted > 0) writing.push_back(q.get());
        while (!writing.empty()) {
            std::vector<Input> inputs;
            std::vector<Sequence*> asking;
            for (Sequence* q : writing)
                for (int end = q->length() + int(q->guesses.size()); q->drafted < end && int(inputs.size()) < s.batch; q->drafted++) {
                    bool last = q->drafted == end - 1;
                    inputs.push_back({q->at(q->drafted), q->slot, q->drafted, last ? int(asking.size()) : -1});
                    if (last) asking.push_back(q);
                }
            model.forward(inputs);
            writing.clear();
            for (size_t row = 0; row < asking.size(); row++) {
                Sequence& q = *asking[row];
                int id = q.next(model.row_of_logits(int(row)), s.vocabulary, int(q.guesses.size()));
                if (id < 0) continue;  // no number: the model will say what to do
                q.guesses.push_back(id);
                if (int(q.guesses.size()) < q.wanted) writing.push_back(&q);
            }
        }
    }

private:
    Shape s;
    Model model;
};

}  // namespace hasten
