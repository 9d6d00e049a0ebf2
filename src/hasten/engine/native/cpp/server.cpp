// Requests in, tokens out: continuous batching around `Model`, as a C interface.
//
// Every pass takes the newest token of each sequence that writes, with guesses of what follows, and fills the batch up
// with prompts in the order of their arrival. No Python runs between tokens; whoever wants them reads them from the request's list.
#include "model.hpp"

#include <chrono>
#include <deque>
#include <memory>
#include <numeric>
#include <string>
#include <unordered_map>

namespace hasten {

using Clock = std::chrono::steady_clock;

enum Status : int32_t { WAITING = 0, RUNNING = 1, FINISHED = 2, CANCELLED = 3, NOT_FINITE = 4 };

struct Sequence {
    std::vector<int32_t> prompt, stops, ids, guesses;
    std::vector<double> seconds;
    int32_t most, slot = -1, fed = 0, status = WAITING;
    float temperature, top_p;
    uint64_t seed;
    bool cancelled = false;
    Clock::time_point sent = Clock::now();
};

// What may come next: what followed the last few tokens where they stood before (prompt lookup, Saxena 2023). At most
// `most` tokens, none if they are new.
inline void guess(Sequence& q, int most) {
    q.guesses.clear();
    const int length = int(q.prompt.size() + q.ids.size()), prompt = int(q.prompt.size());
    auto at = [&](int i) { return i < prompt ? q.prompt[i] : q.ids[i - prompt]; };
    for (int gram = 3; gram >= 2 && q.guesses.empty(); gram--)
        for (int end = length - 1; end >= gram && q.guesses.empty(); end--) {  // the latest place first
            bool same = true;
            for (int i = 1; i <= gram && same; i++) same = at(end - i) == at(length - i);
            for (int i = end; same && i < length && int(q.guesses.size()) < most; i++) q.guesses.push_back(at(i));
        }
}

// A number in [0, 1) that depends on the seed and the place alone (splitmix64, Steele et al. 2014).
inline double uniform(uint64_t seed, uint64_t place) {
    uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull, z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return double((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

// Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): the most likely tokens that together have `top_p`.
inline int sample(const float* logits, int count, float temperature, float top_p, double chance) {
    const float largest = logits[place_of_largest(logits, count)];
    std::vector<double> weight(count);
    double total = 0;
    for (int i = 0; i < count; i++) total += weight[i] = std::exp((double(logits[i]) - largest) / temperature);
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    auto less = [&](int a, int b) { return weight[a] != weight[b] ? weight[a] < weight[b] : a > b; };
    std::vector<int> kept;
    double mass = 0;
    if (top_p < 1) {
        std::make_heap(order.begin(), order.end(), less);
        for (auto end = order.end(); end != order.begin() && mass < double(top_p) * total; --end) {
            std::pop_heap(order.begin(), end, less);
            kept.push_back(*(end - 1)), mass += weight[*(end - 1)];
        }
    } else
        kept = order, mass = total;
    double left = chance * mass;
    for (int i : kept)
        if ((left -= weight[i]) < 0) return i;
    return kept.back();
}

class Server {
public:
    std::atomic<int64_t> guessed{0}, right{0};

    explicit Server(const Shape& shape) : s(shape), model(shape), free_(shape.slots) {
        std::iota(free_.rbegin(), free_.rend(), 0);
        worker_ = std::thread([this] { serve(); });
    }
    ~Server() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        worker_.join();
    }

    int64_t submit(std::shared_ptr<Sequence> sequence) {
        std::lock_guard<std::mutex> lock(mutex_);
        int64_t handle = next_++;
        all_[handle] = sequence, waiting_.push_back(sequence);
        wake_.notify_all();
        return handle;
    }

    // Copies tokens from number `seen` on; how many, and the status at that moment. A forgotten request is cancelled.
    int poll(int64_t handle, int seen, int room, int32_t* ids, double* seconds, int32_t* status) {
        std::lock_guard<std::mutex> lock(mutex_);
        *status = CANCELLED;
        if (!all_.count(handle)) return 0;
        Sequence& q = *all_[handle];
        int count = std::min(room, int(q.ids.size()) - seen);
        std::copy_n(q.ids.begin() + seen, count, ids), std::copy_n(q.seconds.begin() + seen, count, seconds);
        *status = seen + count == int(q.ids.size()) ? q.status : int32_t(RUNNING);
        return count;
    }

    // Waits until the request has ended, at most so long.
    void wait(int64_t handle, double seconds) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!all_.count(handle)) return;
        auto sequence = all_[handle];
        ended_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return sequence->status >= FINISHED; });
    }

    void cancel(int64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (all_.count(handle)) all_[handle]->cancelled = true;
        wake_.notify_all();
    }

    void forget(int64_t handle) {
        cancel(handle);
        std::lock_guard<std::mutex> lock(mutex_);
        all_.erase(handle);
    }

    size_t cache_bytes() const { return model.cache_bytes(); }

private:
    using Asking = std::vector<std::pair<std::shared_ptr<Sequence>, int>>;

    void serve() {
        stay_on_core(0, s.threads);  // it is the first of the team
        std::vector<Input> inputs;
        Asking asking;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                admit();
                while (running_.empty() && !closing_) wake_.wait(lock), admit();
                if (closing_) {
                    for (auto& q : running_) end(*q, CANCELLED);
                    for (auto& q : waiting_) end(*q, CANCELLED);
                    ended_.notify_all();
                    return;
                }
                plan(inputs, asking);
            }
            model.forward(inputs);
            std::vector<std::vector<int>> chosen;
            for (auto& [q, row] : asking) chosen.push_back(choose(*q, row));
            std::lock_guard<std::mutex> lock(mutex_);
            for (size_t i = 0; i < asking.size(); i++)
                for (int id : chosen[i]) take(*asking[i].first, id);
            auto over = [&](auto& q) { return q->status >= FINISHED; };
            running_.erase(std::remove_if(running_.begin(), running_.end(), over), running_.end());
        }
    }

    // Cancelled requests go, waiting ones get the free slots.
    void admit() {
        auto dropped = [&](auto& q) {
            if (q->cancelled) end(*q, CANCELLED);
            return q->cancelled;
        };
        running_.erase(std::remove_if(running_.begin(), running_.end(), dropped), running_.end());
        waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), dropped), waiting_.end());
        while (!waiting_.empty() && !free_.empty()) {
            auto q = waiting_.front();
            waiting_.pop_front();
            q->slot = free_.back(), q->status = RUNNING;
            free_.pop_back(), running_.push_back(q);
        }
    }

    // Inputs of the next pass, and who asks for what comes next, with the first of its rows of logits. A guess is computed
    // in the same pass as what it depends on; if it was wrong, its place in the cache is written again.
    void plan(std::vector<Input>& inputs, Asking& asking) {
        inputs.clear(), asking.clear();
        int rows = 0, room = s.batch - int(running_.size());
        for (auto& q : running_) {
            if (q->ids.empty()) continue;
            guess(*q, std::min({s.guesses, room, q->most - int(q->ids.size()) - 1}));
            room -= int(q->guesses.size());
            asking.push_back({q, rows});
            inputs.push_back({q->ids.back(), q->slot, q->fed, rows++});
            for (int i = 0; i < int(q->guesses.size()); i++) inputs.push_back({q->guesses[i], q->slot, q->fed + 1 + i, rows++});
        }
        for (auto& q : running_) {
            if (!q->ids.empty()) continue;
            for (int length = int(q->prompt.size()); q->fed < length && int(inputs.size()) < s.batch; q->fed++) {
                bool last = q->fed == length - 1;
                if (last) asking.push_back({q, rows});
                inputs.push_back({q->prompt[q->fed], q->slot, q->fed, last ? rows++ : -1});
            }
        }
    }

    // What comes next: one token more than guesses were right; -1 where what decides it is not a number.
    std::vector<int> choose(Sequence& q, int row) {
        std::vector<int> chosen;
        for (size_t i = 0; i <= q.guesses.size(); i++) {
            const float* logits = model.row_of_logits(row + int(i));
            int best = place_of_largest(logits, s.vocabulary);
            if (!std::isfinite(logits[best]))
                best = -1;
            else if (q.temperature > 0)
                best = sample(logits, s.vocabulary, q.temperature, q.top_p, uniform(q.seed, q.ids.size() + i));
            chosen.push_back(best);
            if (i == q.guesses.size() || best != q.guesses[i]) break;
        }
        guessed += int64_t(q.guesses.size()), right += int64_t(chosen.size()) - 1;
        q.guesses.clear();
        return chosen;
    }

    void take(Sequence& q, int id) {
        if (q.status >= FINISHED) return;  // it stopped within what was guessed
        if (id < 0) return end(q, NOT_FINITE);
        q.ids.push_back(id);
        q.fed = int(q.prompt.size() + q.ids.size()) - 1;
        q.seconds.push_back(std::chrono::duration<double>(Clock::now() - q.sent).count());
        bool stops = std::find(q.stops.begin(), q.stops.end(), id) != q.stops.end();
        if (stops || int(q.ids.size()) == q.most) end(q, FINISHED);
    }

    void end(Sequence& q, Status status) {
        if (q.slot >= 0) free_.push_back(q.slot), q.slot = -1;
        q.status = status;
        ended_.notify_all();
    }

    Shape s;
    Model model;
    std::vector<int> free_;
    std::deque<std::shared_ptr<Sequence>> waiting_;
    std::vector<std::shared_ptr<Sequence>> running_;
    std::unordered_map<int64_t, std::shared_ptr<Sequence>> all_;
    int64_t next_ = 1;
    bool closing_ = false;
    std::mutex mutex_;
    std::condition_variable wake_, ended_;
    std::thread worker_;
};

}  // namespace hasten

using hasten::Sequence;
using hasten::Server;

extern "C" {

// Which kernels this build has.
const char* hasten_kernels() {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
    return "AVX512-VNNI, AVX512-BF16";
#elif defined(__AVX512VNNI__)
    return "AVX512-VNNI";
#elif defined(__AVX512F__)
    return "AVX512";
#else
    return "portable";
#endif
}

Server* hasten_open(const hasten::Shape* shape) {
    try {
        return new Server(*shape);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void hasten_close(Server* server) { delete server; }
// Tokens that were guessed, and those of them that were right.
void hasten_guesses(const Server* server, int64_t* guessed, int64_t* right) {
    *guessed = server->guessed, *right = server->right;
}
int64_t hasten_cache_bytes(const Server* server) { return int64_t(server->cache_bytes()); }

int64_t hasten_submit(Server* server, const int32_t* prompt, int32_t length, int32_t most, const int32_t* stops,
                      int32_t stop_count, float temperature, float top_p, uint64_t seed) {
    auto q = std::make_shared<Sequence>();
    q->prompt.assign(prompt, prompt + length), q->stops.assign(stops, stops + stop_count);
    q->most = most, q->temperature = temperature, q->top_p = top_p, q->seed = seed;
    q->ids.reserve(most), q->seconds.reserve(most);
    return server->submit(std::move(q));
}

int32_t hasten_poll(Server* server, int64_t handle, int32_t seen, int32_t room, int32_t* ids, double* seconds, int32_t* status) {
    return server->poll(handle, seen, room, ids, seconds, status);
}
void hasten_wait(Server* server, int64_t handle, double seconds) { server->wait(handle, seconds); }
void hasten_cancel(Server* server, int64_t handle) { server->cancel(handle); }
void hasten_forget(Server* server, int64_t handle) { server->forget(handle); }
}
